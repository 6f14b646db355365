"""Starting the application."""

import subprocess
import sys

import pytest

from api.main import create_app
from shared.errors import ConfigurationError


def test_the_api_loads_without_torch_and_reads_and_connects_nothing() -> None:
    code = """
import os, socket, sys
socket.socket.connect = None
os.environ["LORELAY_REDIS_URL"] = "nonsense"
import api.main
heavy = {"torch", "transformers", "peft", "worker"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_or_malformed_setting_stops_the_start_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORELAY_REDIS_URL", raising=False)
    with pytest.raises(ConfigurationError, match="LORELAY_REDIS_URL"):
        create_app()
    monkeypatch.setenv("LORELAY_REDIS_URL", "redis://127.0.0.1:1")
    monkeypatch.setenv("LORELAY_QUEUE_TIME_LIMIT_S", "soon")
    with pytest.raises(ConfigurationError, match="LORELAY_QUEUE_TIME_LIMIT_S"):
        create_app()


def test_the_settings_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORELAY_REDIS_URL", "redis://127.0.0.1:1")
    monkeypatch.setenv("LORELAY_QUEUE_TIME_LIMIT_S", "5")
    monkeypatch.setenv("LORELAY_GENERATION_LIMIT_S", "7")
    assert create_app().state.relay.queue.exchange_limit_s == 5 + 7 + 60
