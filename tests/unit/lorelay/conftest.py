"""Fixtures of the command line's tests: an environment without settings, folders to name."""

import os
from pathlib import Path

import pytest

from lorelay import plan
from tests.redis_server import free_port


@pytest.fixture
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting but a free port and a state folder; no GPU; the working folder is `tmp_path`."""
    for name in [name for name in os.environ if name.startswith(("LORELAY_", "SSL_", "CUDA_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(plan, "visible_gpus", lambda environ: [])
    monkeypatch.setenv("LORELAY_SERVER_PORT", str(free_port()))
    monkeypatch.setenv("LORELAY_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "smol"
    folder.mkdir()
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "demo" / "pirate"
    folder.mkdir(parents=True)
    return folder
