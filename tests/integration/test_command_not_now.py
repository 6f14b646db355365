"""`lorelay` on a server that says "not now": one line, and no traceback."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import redis

from lorelay.main import main
from tests.deployment import BIN, Deployment
from tests.redis_server import RedisServer, free_port, server_binary
from tests.server_faults import BUSY_OPTIONS, busy, orphaned
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with (
        tempfile.TemporaryDirectory(prefix="lorelay-") as folder,
        RedisServer(server_binary(), Path(folder), port=free_port(), options=BUSY_OPTIONS) as server,
    ):
        yield server


@pytest.fixture
def admin(server: RedisServer) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server.url) as connection:
        yield connection


@pytest.mark.parametrize(("state", "code"), [(busy, "BUSY"), (orphaned, "MASTERDOWN")])
def test_status_says_in_one_line_that_it_can_not_be_read_now(
    server: RedisServer, admin: redis.Redis, capsys: pytest.CaptureFixture[str], state: object, code: str
) -> None:
    with state(admin):  # type: ignore[operator]
        assert main(["status", "--redis-url", server.url]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"lorelay: Redis is not available now, try again later: {code} ")
    assert error.count("\n") == 1


def test_serve_says_in_one_line_that_its_server_does_not_serve_now(
    server: RedisServer, admin: redis.Redis, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with busy(admin):
        words = ["serve", str(tmp_path), "--redis-url", server.url, "--server-port", str(free_port())]
        assert main(words) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("lorelay: LORELAY_REDIS_URL (--redis-url): Redis is not available now")


def test_a_page_of_the_dashboard_says_so_and_comes_back(
    server: RedisServer, admin: redis.Redis, tmp_path: Path
) -> None:
    url = f"http://127.0.0.1:{(port := free_port())}/"
    with Deployment(server.url, tmp_path) as deployment:
        words = ["dashboard", "--redis-url", server.url, "--port", str(port)]
        process = deployment.start([str(BIN / "lorelay"), *words])
        process.wait_for("Running on")
        with busy(admin):
            page = httpx.get(f"{url}0/data/queues.json", trust_env=False)
            assert page.status_code == 503
            assert page.text.startswith("Redis is not available now, try again later: BUSY ")
        wait_until(lambda: httpx.get(f"{url}0/data/queues.json", trust_env=False).status_code == 200)
        assert "Traceback" not in process.output
