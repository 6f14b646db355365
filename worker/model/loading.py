"""Loads the base model: finds its folder and its device, loads its weights, and reads its context length."""

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from shared.errors import ConfigurationError
from shared.logs import fields
from shared.paths import expand_home, split_revision
from shared.settings import WorkerSettings
from worker.model import attention
from worker.model.checkpoint import check_model
from worker.model.versions import WEIGHT_PATTERNS

logger = logging.getLogger(__name__)

_LOAD_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, EOFError, UnpicklingError)
_OTHER_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.py")


def looks_like_path(name: str) -> bool:
    """True if a name must be a folder, because it can't be a Hugging Face id (`owner/name` or `name`)."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or (os.sep != "/" and os.sep in name)


def download(repository: str, revision: str | None, patterns: Iterable[str]) -> Path:
    """Downloads the matching files of a Hugging Face repository, if not cached; returns their folder.

    Raises:
        OSError: the repository does not exist or can't be reached.
        ValueError: the name is not a valid repository name.
    """
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    logger.info("%s: revision %s", repository, folder.name, extra=fields("download"))
    return folder


def find_model(settings: WorkerSettings) -> Path:
    """Returns the model's folder; downloads the model if the setting is a Hugging Face id.

    Raises:
        ConfigurationError: there is no such folder or repository, or it has no model that can be served.
    """
    try:
        folder = expand_home(settings.model)
        repository, revision = split_revision(settings.model)
    except ValueError as error:
        raise ConfigurationError(f"LORELAY_MODEL: {error}") from error
    if not folder.is_dir():
        if looks_like_path(repository):
            raise ConfigurationError(f"LORELAY_MODEL: the folder {settings.model} does not exist")
        if revision and settings.revision and revision != settings.revision:
            raise ConfigurationError(
                f"LORELAY_REVISION: {settings.revision} is another revision than that of {settings.model}"
            )
        folder = _download_model(repository, revision or settings.revision, settings.model)
    check_model(folder, settings.model)
    return folder


def _download_model(repository: str, revision: str | None, name: str) -> Path:
    try:
        folder = download(repository, revision, (*_OTHER_FILES, WEIGHT_PATTERNS[0]))
        if not any(folder.glob(WEIGHT_PATTERNS[0])):
            folder = download(repository, revision, (*_OTHER_FILES, WEIGHT_PATTERNS[1]))
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"LORELAY_MODEL: {name} is neither a local folder nor a repository that can be downloaded: "
            f"{error}"
        ) from error
    return folder


def find_device(name: str) -> torch.device:
    """Returns the device for `auto` (first GPU, else CPU), `cpu`, `cuda` or `cuda:N`.

    Raises:
        ConfigurationError: the name is malformed, or this machine has no such device.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda:0" if num_gpus else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError(f"LORELAY_DEVICE: {name!r} is not auto, cpu, cuda or cuda:N") from error
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise ConfigurationError(f"LORELAY_DEVICE: {name!r} is not auto, cpu, cuda or cuda:N")
    if (device.index or 0) >= num_gpus:
        raise ConfigurationError(
            f"LORELAY_DEVICE: there is no {name}: this machine has {num_gpus} usable GPUs"
        )
    return torch.device("cuda", device.index or 0)


def load_model(folder: Path, settings: WorkerSettings, device: torch.device) -> Any:
    """Loads the causal language model in `folder` onto `device`, with Lorelay's attention function.

    Raises:
        ConfigurationError: the model is not a causal language model, lacks weights, or doesn't load.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    attention.register()
    dtype = settings.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=settings.trust_remote_code)
        if config.is_encoder_decoder:
            raise ConfigurationError(f"LORELAY_MODEL: {folder} is an encoder-decoder model, not a causal one")
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=attention.NAME,
            trust_remote_code=settings.trust_remote_code,
            device_map={"": device},
            output_loading_info=True,
            # The grouped kernels that transformers uses for experts don't support float64.
            **({"experts_implementation": "eager"} if dtype == torch.float64 else {}),
        )
    except (*_LOAD_ERRORS, SafetensorError) as error:
        if isinstance(error, KeyError) and error.args == (attention.NAME,):
            raise ConfigurationError(
                f"LORELAY_MODEL: {folder} can't be served: {config.model_type} models don't let their "
                "attention function be replaced"
            ) from error
        raise ConfigurationError(
            f"LORELAY_MODEL, LORELAY_DTYPE ({settings.dtype}), LORELAY_DEVICE ({settings.device}): "
            f"{folder} doesn't load as a causal language model: {error}"
        ) from error
    model, report = loaded
    if report["missing_keys"]:
        names = ", ".join(sorted(report["missing_keys"])[:3])
        raise ConfigurationError(
            f"LORELAY_MODEL: {folder} is not a whole causal language model: it lacks weights for {names}"
        )
    if device.type == "cpu":
        _copy_from_files(model)
    return model.eval()


def _copy_from_files(model: Any) -> None:
    """Copies the weights from the pages of their files into other memory.

    On a CPU, weights are pages of their files until they are copied. If a file were truncated, the worker
    would die of SIGBUS. If the file were overwritten, the worker would use other weights under the same
    version.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def max_model_len(config: Any, session_len: int | None) -> int:
    """Returns the context length in tokens: `session_len`, or the model's own if `session_len` is None.

    Raises:
        ConfigurationError: `session_len` exceeds the model's context length, or both are unknown.
    """
    limit, reason = _length_limit(config)
    if limit is None:
        if session_len is None:
            raise ConfigurationError(
                "LORELAY_SESSION_LEN: this model's config names no context length; set one"
            )
        return session_len
    if session_len is not None and session_len > limit:
        raise ConfigurationError(f"LORELAY_SESSION_LEN: {session_len} is more than {limit}, {reason}")
    return session_len or limit


def _length_limit(config: Any) -> tuple[int | None, str]:
    text_config = config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None)
    reason = "the model's context length"
    rope = getattr(text_config, "rope_parameters", None) or {}
    for entry in (
        rope.values() if rope and all(isinstance(value, dict) for value in rope.values()) else [rope]
    ):
        # These types take the frequencies from the longest sequence of a batch: one sequence beyond the
        # original length would change the results of all others.
        if "dynamic" in entry.get("rope_type", "default") or entry.get("rope_type") == "longrope":
            original = entry.get("original_max_position_embeddings") or limit
            if original is not None and (limit is None or original <= limit):
                limit = original
                reason = f"the original context length of a model with {entry['rope_type']} rope scaling"
    if "chunked_attention" in (getattr(text_config, "layer_types", None) or ()):
        limit = min(limit or text_config.attention_chunk_size, text_config.attention_chunk_size)
        reason = "the attention chunk of this model, beyond which it is not served"
    return limit, reason
