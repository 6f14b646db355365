"""`scripts/setup` and a virtual environment that somebody else made; `scripts/test` and what fails in it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def write_program(path: Path, *lines: str) -> None:
    """A shell script in place of a program."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(("#!/bin/sh", *lines, "")))
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what `scripts/setup` looks at."""
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/setup", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def setup(checkout: Path, python: str) -> subprocess.CompletedProcess[str]:
    """Runs it where `.venv/bin/python` is this shell script."""
    own = checkout / ".venv" / "bin" / "python"
    write_program(own, python)
    # With `true` for a Python, a new environment would be an empty one.
    done = subprocess.run(
        [checkout / "scripts/setup"],
        env={**os.environ, "PYTHON": "true"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert own.exists(), "it is gone"
    return done


def test_an_environment_of_others_is_used_as_it_is(checkout: Path) -> None:
    assert setup(checkout, "exit 0").returncode == 0


@pytest.mark.parametrize(
    ("python", "lacking"),
    [("echo torch pytest", "lacks torch pytest"), ("exit 1", "lacks a Python that runs")],
)
def test_one_that_lacks_something_is_left_alone_and_its_owner_told(
    checkout: Path, python: str, lacking: str
) -> None:
    done = setup(checkout, python)
    assert done.returncode == 1
    assert lacking in done.stderr


def test_an_activated_environment_is_made_anew_with_the_python_behind_it(checkout: Path) -> None:
    bin_folder, python = checkout / ".venv" / "bin", checkout / "python"
    write_program(bin_folder / "python3", f'case "$2" in *_base_executable*) echo {python} ;; esac')
    (checkout / ".venv" / "setup-stamp").write_text("that of an earlier release")
    write_program(python, "mkdir -p .venv/bin", "ln -s /bin/true .venv/bin/python")
    done = subprocess.run(
        [checkout / "scripts/setup"],
        env={**os.environ, "PYTHON": "python3", "PATH": f"{bin_folder}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (bin_folder / "python").is_symlink()


def run_tests(folder: Path, *, lint: str, pytest: str) -> subprocess.CompletedProcess[str]:
    """Runs `scripts/test` with these shell commands in place of lint and pytest."""
    write_program(folder / "scripts/setup")
    write_program(folder / "scripts/lint", lint)
    write_program(folder / ".venv/bin/python", pytest)
    script = folder / "scripts/test"
    shutil.copy(ROOT / "scripts/test", script)
    return subprocess.run([script], capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("failing", ["nothing", "lint", "pytest"])
def test_the_command_fails_if_lint_or_pytest_does_and_shows_why(tmp_path: Path, failing: str) -> None:
    commands = {name: f"echo {name} ends; exit {int(name == failing)}" for name in ("lint", "pytest")}
    done = run_tests(tmp_path, **commands)
    assert done.returncode == (failing != "nothing"), done.stderr
    for name in {"lint", failing} - {"nothing"}:
        assert f"{name} ends" in done.stdout


def test_lint_that_fails_interrupts_the_tests_as_ctrl_c_does(tmp_path: Path) -> None:
    begun, ended = tmp_path / "begun", tmp_path / "ended"
    os.mkfifo(begun)
    # A shell runs its trap once the sleep has ended, which gets the same signal.
    interrupted = f"trap 'echo >> {ended}; exit 1' INT; echo > {begun}; sleep 50"
    done = run_tests(tmp_path, lint=f"cat {begun} > /dev/null; exit 1", pytest=interrupted)
    assert done.returncode == 1
    assert ended.exists()
    assert "the tests are stopped" in done.stderr
