"""Building the kernels; `test_attention` and `test_lora` say what they compute."""

import logging
from pathlib import Path

import pytest
import torch

from tests.compiled import need_kernels
from worker import kernels

CPU = torch.device("cpu")


def test_kernels_are_built_once_and_found_again(tmp_path: Path) -> None:
    need_kernels()
    folder = tmp_path / "new" / "folder"
    build = kernels.start_build(CPU, folder)
    assert build is not None
    assert build.finish()
    (built,) = folder.iterdir()
    made_ns = built.stat().st_mtime_ns
    again = kernels.start_build(CPU, folder)
    assert again is not None
    assert again.finish()
    assert [file.stat().st_mtime_ns for file in folder.iterdir()] == [made_ns]


def test_without_a_compiler_the_log_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernels, "_COMPILER", "no-such-compiler")
    with caplog.at_level(logging.INFO):
        assert kernels.start_build(CPU, tmp_path) is None
    assert "no-such-compiler" in caplog.text


def test_a_source_that_does_not_compile_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    need_kernels()
    source = tmp_path / "broken.cpp"
    source.write_text("no C++ at all")
    monkeypatch.setattr(kernels, "_SOURCE", source)
    build = kernels.start_build(CPU, tmp_path / "kept")
    assert build is not None
    assert not build.finish()
    assert "broken.cpp" in caplog.text
    assert list((tmp_path / "kept").iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    need_kernels()
    (tmp_path / "file").touch()
    with caplog.at_level(logging.INFO):
        assert kernels.start_build(CPU, tmp_path / "file" / "folder") is None
    assert str(tmp_path / "file") in caplog.text


def test_a_broken_file_is_removed_so_that_the_next_start_builds_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    need_kernels()
    monkeypatch.setattr(kernels, "_are_loaded", lambda: False)
    broken = tmp_path / f"kernels-{kernels._fingerprint()}.so"
    broken.write_bytes(b"cut off")
    build = kernels.start_build(CPU, tmp_path)
    assert build is not None
    assert not build.finish()
    assert "cut off" not in caplog.text
    assert broken.name in caplog.text
    assert not broken.exists()


def test_a_gpu_has_no_use_for_them(tmp_path: Path) -> None:
    assert kernels.start_build(torch.device("cuda"), tmp_path) is None
    assert list(tmp_path.iterdir()) == []
