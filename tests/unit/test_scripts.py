"""`scripts/setup` and a virtual environment that somebody else made."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


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
    own.parent.mkdir(parents=True)
    own.write_text(f"#!/bin/sh\n{python}\n")
    own.chmod(0o755)
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
