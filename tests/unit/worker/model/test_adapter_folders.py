"""Hostile folders of adapters: pipes, devices, sparse and compressed files, patterns without end."""

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.errors import AdapterError
from tests.tiny_models import build_adapter, build_model, change_json
from worker.model import limited_process_main
from worker.model.adapter_files import load_adapter
from worker.model.adapter_tokenizer import TokenizerProblem, own_files
from worker.model.limited_process import LimitedProcess

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base)


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_adapter(tmp_path_factory.mktemp("adapters") / "whole", base)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(whole, tmp_path / "mine"))


@pytest.fixture(scope="module")
def limited() -> Iterator[LimitedProcess]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(limited_process_main.LIMIT_VARIABLE, "0.3")
        process = LimitedProcess()
        yield process
        process.close()


def refusal(folder: Path, model: Any, limited: LimitedProcess | None = None) -> str:
    with pytest.raises(AdapterError) as caught:
        load_adapter("mine", str(folder), model, patterns=limited)
    assert str(folder) in caught.value.message
    return caught.value.message


def make_loop(path: Path) -> None:
    path.symlink_to(path)


def make_sparse(path: Path, header: bytes = b"") -> None:
    with path.open("wb") as file:
        file.write(header)
        file.truncate(10 * 2**30)


NO_FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a pipe": (os.mkfifo, "is no regular file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "is no regular file"),
    "a folder": (lambda path: path.mkdir(), "is no regular file"),
    "a link to itself": (make_loop, "can't be opened: Too many levels of symbolic links"),
}


@pytest.mark.parametrize("name", NO_FILES)
@pytest.mark.parametrize("file_name", [CONFIG, WEIGHTS])
def test_what_is_no_regular_file_is_refused_by_name(
    name: str, file_name: str, folder: Path, model: Any
) -> None:
    make, reason = NO_FILES[name]
    (folder / file_name).unlink()
    make(folder / file_name)
    assert f"{file_name} {reason}" in refusal(folder, model)


@pytest.mark.parametrize("name", NO_FILES)
@pytest.mark.parametrize("file_name", ["tokenizer.json", "chat_template.jinja", "generation_config.json"])
def test_a_file_of_the_tokenizer_that_is_no_regular_one_is_refused(
    name: str, file_name: str, tmp_path: Path
) -> None:
    make, reason = NO_FILES[name]
    make(tmp_path / file_name)
    with pytest.raises(TokenizerProblem, match=f"{file_name} {reason}"):
        own_files(tmp_path)


def test_links_to_files_are_followed_as_in_the_caches_of_hugging_face(folder: Path, model: Any) -> None:
    for name in (CONFIG, WEIGHTS):
        (folder / name).rename(folder / f"blob-{name}")
        (folder / name).symlink_to(f"blob-{name}")
    assert load_adapter("mine", str(folder), model).layers


def _header(**fields: Any) -> bytes:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **fields}}).encode()
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"", "its header has 0 bytes"),
        (b"\xff" * 8, "its header has 18446744073709551615 bytes"),
        ((2**30).to_bytes(8, "little"), "its header has 1073741824 bytes"),
        ((2).to_bytes(8, "little") + b"[]", "damaged header"),
        ((200_000).to_bytes(8, "little") + b"[" * 200_000, "damaged header"),
        (_header(shape=None), "damaged header"),
        (_header(), "bytes, but its tensors take"),
    ],
)
def test_a_sparse_file_of_10_gb_is_refused_by_its_header(
    header: bytes, reason: str, folder: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.model.adapter_files.num_free_bytes", lambda device: 2**40)
    make_sparse(folder / WEIGHTS, header)
    assert reason in refusal(folder, model)


def test_weights_that_fill_the_free_memory_are_refused(
    folder: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.model.adapter_files.num_free_bytes", lambda device: 18 * 2**30)
    make_sparse(folder / WEIGHTS)
    assert f"{WEIGHTS} has 10240 MiB, and only 9216 MiB are free for it" in refusal(folder, model)


def test_weights_of_another_shape_are_refused_before_they_are_read(
    folder: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.model.adapter_files._read_weights", None)
    change_json(folder / CONFIG, r=16)
    assert "made for another base" in refusal(folder, model)


def test_a_compressed_archive_is_refused(folder: Path, model: Any) -> None:
    (folder / WEIGHTS).unlink()
    with zipfile.ZipFile(folder / "adapter_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 1_000_000)
    assert "adapter_model.bin is compressed" in refusal(folder, model)


def test_a_config_that_is_nested_deeply_or_very_large_is_refused(folder: Path, model: Any) -> None:
    (folder / CONFIG).write_text('{"a":' * 10_000 + "1" + "}" * 10_000)
    assert f"{CONFIG} is nested too deeply" in refusal(folder, model)
    (folder / CONFIG).write_text('{"a": "' + "x" * 5_000_000 + '"}')
    assert f"{CONFIG} is larger than 4 MiB" in refusal(folder, model)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "(.+)+!"},
        {"exclude_modules": "(([a-z_.0-9])+)+!"},
        {"layers_to_transform": [0], "layers_pattern": ["(.+)+!"]},
        {"rank_pattern": {"(.+)+!": 4}},
        {"alpha_pattern": {"(.+)+!": 4}},
    ],
)
def test_a_pattern_that_backtracks_for_ever_is_refused_by_its_field(
    fields: dict[str, Any], folder: Path, model: Any, limited: LimitedProcess
) -> None:
    change_json(folder / CONFIG, **fields)
    message = refusal(folder, model, limited)
    assert f"its {list(fields)[-1]} " in message
    assert "+)+!' can't be used: it takes longer than 0.3 s" in message


def test_a_pattern_that_ends_is_used(folder: Path, model: Any, limited: LimitedProcess) -> None:
    change_json(folder / CONFIG, target_modules=r".*\.(q_proj|v_proj)")
    assert load_adapter("mine", str(folder), model, patterns=limited).layers
