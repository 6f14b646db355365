"""The documentation page, looked at with a real browser that has no internet."""

import shutil
import subprocess
from pathlib import Path

import pytest
import redis

from tests.integration.api_harness import ScriptedWorker, running_api
from tests.redis_server import RedisServer

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=20000",
    "--dump-dom",
)


@pytest.fixture
def worker(connection: redis.Redis) -> ScriptedWorker:
    return ScriptedWorker(connection)


@pytest.mark.long
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on PATH")
@pytest.mark.parametrize("path", ["/", "/docs"])
def test_the_documentation_page_renders_with_routes_and_models(
    redis_server: RedisServer, worker: ScriptedWorker, tmp_path: Path, path: str
) -> None:
    with running_api(redis_server.url) as api:
        command = [str(CHROMIUM), *QUIET, f"--user-data-dir={tmp_path}", api.url + path]
        page = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100).stdout
    assert "swagger-ui" in page
    assert "Continue a conversation" in page
    assert "org/pirate" in page
