"""Building the kernels; `test_attention` and `test_lora` say what they compute."""

import fcntl
import logging
import os
import platform
import struct
import termios
from pathlib import Path

import pytest
import torch

from tests.compiled import need_kernels
from worker.model.kernels import native

CPU = torch.device("cpu")


def test_kernels_are_built_once_and_found_again(tmp_path: Path) -> None:
    need_kernels()
    folder = tmp_path / "new" / "folder"
    assert native.make_callable(CPU, folder)
    (built,) = folder.iterdir()
    made = built.stat().st_ino
    os.utime(built, (0, 0))
    assert native.make_callable(CPU, folder)
    assert [file.stat().st_ino for file in folder.iterdir()] == [made]
    assert built.stat().st_mtime > 0  # so that it is known to be in use


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_that_works_the_log_says_so(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "COMPILER", compiler)
    caplog.set_level(logging.INFO)
    assert not native.make_callable(CPU, tmp_path)
    assert compiler in caplog.text


def test_a_source_that_does_not_compile_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    need_kernels()
    source = tmp_path / "broken.cpp"
    source.write_text("no C++ at all")
    monkeypatch.setattr(native, "_SOURCE", source)
    assert not native.make_callable(CPU, tmp_path / "kept")
    assert "broken.cpp" in caplog.text
    assert list((tmp_path / "kept").iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    need_kernels()
    (tmp_path / "file").touch()
    assert not native.make_callable(CPU, tmp_path / "file" / "folder")
    assert str(tmp_path / "file") in caplog.text


def test_a_broken_file_is_removed_so_that_the_next_start_builds_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    need_kernels()
    monkeypatch.setattr(native, "_are_loaded", lambda: False)
    broken = tmp_path / f"kernels-{native.fingerprint()}.so"
    broken.write_bytes(b"cut off")
    assert not native.make_callable(CPU, tmp_path)
    assert broken.name in caplog.text
    assert not broken.exists()


def test_without_a_folder_to_keep_them_the_log_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", fail)
    assert not native.make_callable(CPU)
    assert "XDG_CACHE_HOME" in caplog.text


@pytest.mark.parametrize(("name", "value"), [("_FLAGS", ("-O0",)), ("COMPILER", "c++")])
def test_another_compiler_or_other_flags_build_anew(
    name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_kernels()
    before = native.fingerprint()
    monkeypatch.setattr(native, name, value)
    assert native.fingerprint() != before


def test_the_environment_of_the_terminal_builds_nothing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    need_kernels()
    before = native.fingerprint()
    for name, value in {
        "COLUMNS": "150",
        "LC_ALL": "de_DE.UTF-8",
        "LANG": "C.UTF-8",
        "LANGUAGE": "de",
        "TERM": "xterm-256color",
        "GCC_COLORS": "error=01;31",
        "OMP_NUM_THREADS": "3",
    }.items():
        monkeypatch.setenv(name, value)
    assert native.fingerprint() == before


def test_a_terminal_of_another_width_builds_nothing_anew() -> None:
    need_kernels()
    before = native.fingerprint()
    controller, terminal = os.openpty()
    try:
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))
        stdin = os.dup(0)
        os.dup2(terminal, 0)
        try:
            assert native.fingerprint() == before
        finally:
            os.dup2(stdin, 0)
            os.close(stdin)
    finally:
        os.close(controller)
        os.close(terminal)


def test_an_update_of_the_operating_systems_kernel_builds_nothing_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    need_kernels()
    before = native.fingerprint()
    monkeypatch.setattr(platform, "platform", lambda *_: "Linux-99")
    monkeypatch.setattr(platform, "release", lambda: "99")
    assert native.fingerprint() == before


def test_a_gpu_has_no_use_for_them(tmp_path: Path) -> None:
    assert not native.make_callable(torch.device("cuda"), tmp_path)
    assert list(tmp_path.iterdir()) == []
