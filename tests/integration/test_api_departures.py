"""Early ends: clients that disconnect, and an API that is told to stop."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
import redis

from shared.queue.records import Claim
from tests.integration.api_harness import (
    CHAT,
    HELLO,
    ApiServer,
    ScriptedWorker,
    decode_stream,
    eventually,
    running_api,
)
from tests.redis_server import RedisServer, free_port
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]


@pytest.fixture
def worker(connection: redis.Redis) -> ScriptedWorker:
    return ScriptedWorker(connection)


@pytest.fixture
def api(redis_server: RedisServer, worker: ScriptedWorker) -> Iterator[ApiServer]:
    with running_api(redis_server.url) as server:
        yield server


@contextlib.contextmanager
def client_of(api: ApiServer, *, stream: bool) -> Iterator[None]:
    """A client that sends its request, reads nothing, and leaves at the end of the context."""
    body = json.dumps({**HELLO, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", api.port)) as connection:
        connection.sendall(
            b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            % (CHAT.encode(), len(body))
        )
        connection.sendall(body)
        yield


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_whose_client_leaves_the_queue_never_runs(
    api: ApiServer, worker: ScriptedWorker, stream: bool
) -> None:
    with client_of(api, stream=stream):
        wait_until(lambda: worker.connection.llen("rq:queue:base"), what="the request in its queue")
    wait_until(lambda: not worker.connection.llen("rq:queue:base"), what="the abort")
    assert worker.try_claim() is None
    wait_until(lambda: not api.relay.inboxes, what="the end of the exchange")


@pytest.mark.parametrize("num_tokens", [0, 3], ids=["in prefill", "between tokens"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_running_request_whose_client_leaves_is_aborted(
    api: ApiServer, worker: ScriptedWorker, stream: bool, num_tokens: int
) -> None:
    with client_of(api, stream=stream):
        claim = worker.claim()
        worker.emit(claim, *("token " for _ in range(num_tokens)))
        assert not worker.is_aborted(claim)
    wait_until(lambda: worker.is_aborted(claim), what="the abort")
    wait_until(lambda: not api.relay.inboxes, what="the end of the exchange")


def test_a_request_that_has_ended_is_not_aborted_when_its_client_leaves(
    api: ApiServer, worker: ScriptedWorker
) -> None:
    with worker.answering("Paris"), httpx.Client(base_url=api.url) as client:
        request_id = client.post(CHAT, json=HELLO).json()["id"]
    assert worker.connection.hget(f"rq:job:{request_id}", "status") == b"finished"


def test_a_hundred_departures_leave_nothing_behind(api: ApiServer, worker: ScriptedWorker) -> None:
    for number in range(100):
        with client_of(api, stream=number % 2 == 0):
            wait_until(lambda: worker.connection.llen("rq:queue:base"), what="the request in its queue")
    wait_until(lambda: not api.relay.inboxes, what="the end of the exchanges")
    wait_until(lambda: not worker.connection.llen("rq:queue:base"), what="the aborts")
    assert worker.try_claim() is None
    assert num_connections(worker) <= 34
    assert not worker.connection.keys("lorelay:reader:*")


def num_connections(worker: ScriptedWorker) -> int:
    """Open connections of the server: ours, the subscriber's, the API's pool."""
    return len(worker.connection.client_list())


@contextlib.asynccontextmanager
async def open_stream(
    url: str, worker: ScriptedWorker
) -> AsyncIterator[tuple["asyncio.Task[httpx.Response]", Claim]]:
    """A stream with its first token under way."""
    async with httpx.AsyncClient(base_url=url) as client:
        task = asyncio.create_task(client.post(CHAT, json={**HELLO, "stream": True}, timeout=30))
        claim = await eventually(worker.try_claim, "the request")
        worker.emit(claim, "one")
        yield task, claim


@contextlib.contextmanager
def uvicorn_process(
    redis_url: str, log: Path, *arguments: str, **settings: str
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The API as an operator starts it."""
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "--factory", "api.main:create_app", "--port", str(port)]
    environment = {**os.environ, "LORELAY_REDIS_URL": redis_url, **settings}
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, *arguments], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            wait_until(lambda: is_up(url), 30, what=f"uvicorn, see {log}")
            yield process, url
        finally:
            process.kill()
            process.wait()


def is_up(url: str) -> bool:
    """True if the API answers."""
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/health").status_code == 200
    return False


async def test_at_sigterm_open_streams_end_with_an_error_when_the_grace_period_is_over(
    redis_server: RedisServer, worker: ScriptedWorker, tmp_path: Path
) -> None:
    log = tmp_path / "uvicorn.log"
    with uvicorn_process(redis_server.url, log, "--timeout-graceful-shutdown", "1") as (process, url):
        async with open_stream(url, worker) as (streaming, claim), httpx.AsyncClient(base_url=url) as client:
            waiting = asyncio.create_task(client.post(CHAT, json=HELLO, timeout=30))
            other = await eventually(worker.try_claim, "the second request")
            process.send_signal(signal.SIGTERM)
            *_, error, done = decode_stream((await streaming).text)
            refused = await waiting
        assert await asyncio.to_thread(process.wait, 30) in (0, -signal.SIGTERM)
    assert (json.loads(error)["error"]["code"], done) == ("server_draining", "[DONE]")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_draining")
    assert worker.is_aborted(claim)
    assert worker.is_aborted(other)
    assert "Traceback" not in log.read_text()
    assert f"request {claim.held.request_id} to base ended: server_draining" in log.read_text()


async def test_at_sigterm_open_streams_end_with_an_error_when_the_apis_own_drain_time_is_over(
    redis_server: RedisServer, worker: ScriptedWorker, tmp_path: Path
) -> None:
    with uvicorn_process(redis_server.url, tmp_path / "log", LORELAY_API_DRAIN_S="0.5") as (process, url):
        async with open_stream(url, worker) as (streaming, claim):
            process.send_signal(signal.SIGTERM)
            *_, error, done = decode_stream((await streaming).text)
        assert await asyncio.to_thread(process.wait, 30) in (0, -signal.SIGTERM)
    assert (json.loads(error)["error"]["code"], done) == ("server_draining", "[DONE]")
    assert worker.is_aborted(claim)


async def test_at_sigterm_a_stream_that_ends_within_the_grace_period_is_complete(
    redis_server: RedisServer, worker: ScriptedWorker, tmp_path: Path
) -> None:
    with uvicorn_process(redis_server.url, tmp_path / "log", "--timeout-graceful-shutdown", "30") as (
        process,
        url,
    ):
        async with open_stream(url, worker) as (streaming, claim):
            process.send_signal(signal.SIGTERM)
            await eventually(lambda: "Shutting down" in (tmp_path / "log").read_text(), "the shutdown")
            worker.emit(claim, "two")
            worker.finish(claim)
            assert decode_stream((await streaming).text)[-1] == "[DONE]"
        assert await asyncio.to_thread(process.wait, 30) in (0, -signal.SIGTERM)
