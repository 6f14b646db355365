"""The cache folder: entries that nobody uses and truncated libraries leave it."""

import os
from pathlib import Path

import pytest
import safetensors
import torch

from shared.settings import WorkerSettings
from tests.tiny_models import build_model
from worker.model.kernels import native
from worker.model.kernels.build_cache import drop_truncated, drop_unused
from worker.model.startup import load_model_runner


def test_entries_unused_for_long_are_removed(tmp_path: Path) -> None:
    for name in ("graph-old", "graph-new", "compiling-killed", "building-killed", "model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    for name in ("kernels-old.so", "kernels-new.so"):
        (tmp_path / name).touch()
    for name in ("graph-old", "building-killed", "kernels-old.so", "model"):
        os.utime(tmp_path / name, (0, 0))
    drop_unused(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"graph-new", "kernels-new.so", "model"}


def test_truncated_libraries_are_removed_before_they_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A disk that lost power leaves such files; to load a library that ends early kills the process."""
    folder = tmp_path / "lorelay"
    (library,) = Path(safetensors.__file__).parent.glob("*.so")
    whole = library.read_bytes()
    for name, content in {
        "kernels-whole.so": whole,
        "kernels-cut.so": whole[: len(whole) // 2],
        "kernels-unwritten.so": whole[: len(whole) // 2].ljust(len(whole), b"\0"),
        "kernels-other.so": b"no library: loading it says so",
        "graph-whole/data/graph.so": whole,
        "graph-cut/data/graph.so": whole[:-1],
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    found: set[str] = set()

    def make_callable(device: torch.device) -> bool:
        found.update(path.name for path in folder.iterdir())
        return False

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "make_callable", make_callable)
    model = build_model(tmp_path / "model")
    load_model_runner(WorkerSettings(model=str(model), device="cpu", cache_max_bytes=1 << 20))
    assert found == {"kernels-whole.so", "kernels-other.so", "graph-whole"}
    assert str(folder / "kernels-cut.so") in caplog.text


def test_a_cache_folder_that_is_missing_or_cannot_be_read_stops_nothing(tmp_path: Path) -> None:
    drop_truncated(tmp_path / "none")
    (tmp_path / "kernels-folder.so").mkdir()
    drop_truncated(tmp_path)
