"""No event is lost or told twice, whatever happens to pub/sub; a slow client harms nobody."""

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from api import responses
from api.relay import event_source
from shared.queue import keys
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
from tests.redis_server import RedisServer, server_binary
from tests.waiting import wait_until


@pytest.fixture
def worker(connection: redis.Redis) -> ScriptedWorker:
    return ScriptedWorker(connection)


@pytest.fixture
def api(redis_server: RedisServer, worker: ScriptedWorker) -> Iterator[ApiServer]:
    with running_api(redis_server.url) as server:
        yield server


def text_of(body: str) -> str:
    """The text of a stream that ended well."""
    *chunks, finish, done = decode_stream(body)
    assert (json.loads(finish)["choices"][0]["finish_reason"], done) == ("stop", "[DONE]")
    return "".join(json.loads(chunk)["choices"][0]["delta"]["content"] for chunk in chunks)


@contextlib.asynccontextmanager
async def streaming(
    api: ApiServer, worker: ScriptedWorker
) -> AsyncIterator[tuple["asyncio.Task[httpx.Response]", Claim]]:
    """A stream that a worker has claimed."""
    async with httpx.AsyncClient(base_url=api.url) as client:
        task = asyncio.create_task(client.post(CHAT, json={**HELLO, "stream": True}, timeout=30))
        yield task, await eventually(worker.try_claim, "the request")


def deafen(worker: ScriptedWorker, claim: Claim) -> bytes:
    """Makes the worker publish this request's events to nobody; returns the channel, to undo it."""
    channel = worker.connection.getdel(keys.reader(claim.held.request_id))
    assert isinstance(channel, bytes)
    return channel


async def test_events_that_were_never_published_come_from_the_log(
    api: ApiServer, worker: ScriptedWorker
) -> None:
    async with streaming(api, worker) as (task, claim):
        deafen(worker, claim)
        worker.emit(claim, "a", "b", "c")
        worker.finish(claim)
        assert text_of((await task).text) == "abc"


async def test_a_gap_is_filled_from_the_log_without_waiting_for_silence(
    redis_server: RedisServer, worker: ScriptedWorker
) -> None:
    with running_api(redis_server.url, max_silence_s=1_000) as api:
        async with streaming(api, worker) as (task, claim):
            worker.emit(claim, "a")
            channel = deafen(worker, claim)
            worker.emit(claim, "b", "c")
            worker.connection.set(keys.reader(claim.held.request_id), channel)
            worker.emit(claim, "d")
            worker.finish(claim)
            assert text_of((await task).text) == "abcd"


async def test_what_was_published_while_the_subscriber_was_cut_off_arrives_when_it_is_back(
    redis_server: RedisServer, worker: ScriptedWorker
) -> None:
    with running_api(redis_server.url, max_silence_s=1_000) as api:
        async with streaming(api, worker) as (task, claim):
            worker.emit(claim, "a")
            worker.connection.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
            worker.emit(claim, "b", "c")
            worker.finish(claim)
            assert text_of((await task).text) == "abc"


async def test_many_cuts_of_the_subscriber_lose_and_double_nothing(
    api: ApiServer, worker: ScriptedWorker
) -> None:
    texts = [f"{number} " for number in range(200)]
    async with streaming(api, worker) as (task, claim):
        for number, text in enumerate(texts):
            if number % 20 == 0:
                worker.connection.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
            worker.emit(claim, text)
        worker.finish(claim)
        assert text_of((await task).text) == "".join(texts)


def test_a_stream_goes_on_after_redis_was_frozen_and_after_it_was_restarted(tmp_path: Path) -> None:
    with (
        RedisServer(
            server_binary(), tmp_path, append_only=True, options=("--appendfsync", "always")
        ) as server,
        redis.Redis.from_url(server.url) as connection,
        running_api(server.url, redis_timeout_s=0.2) as api,
        httpx.Client(base_url=api.url) as client,
    ):
        worker = ScriptedWorker(connection)
        with worker.answering():
            assert client.post(CHAT, json=HELLO).status_code == 200
        with worker_thread(worker, server) as texts:
            assert text_of(client.post(CHAT, json={**HELLO, "stream": True}, timeout=30).text) == "".join(
                texts
            )


@contextlib.contextmanager
def worker_thread(worker: ScriptedWorker, server: RedisServer) -> Iterator[list[str]]:
    """A worker that goes on with one request while its server freezes and dies."""
    texts = ["before ", "frozen ", "restarted ", "after"]

    def work() -> None:
        claim = worker.claim()
        worker.emit(claim, texts[0])
        server.freeze()
        threading.Event().wait(0.6)
        server.thaw()
        worker.emit(claim, texts[1])
        server.kill()
        server.start()
        worker.emit(claim, texts[2], texts[3])
        worker.finish(claim)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield texts
    finally:
        thread.join()


async def test_a_slow_client_gets_everything_and_its_inbox_stays_small(
    redis_server: RedisServer, worker: ScriptedWorker
) -> None:
    num_events, text = 600, "x" * 20_000
    with running_api(redis_server.url, max_inbox_events=8) as server, slow_client(server) as slow:
        slow.sendall(raw_request({**HELLO, "stream": True}))
        claim = await eventually(worker.try_claim, "the request")
        for number in range(num_events):
            worker.emit(claim, f"<{number}>{text}")
        worker.finish(claim)
        (inbox,) = server.relay.inboxes
        assert inbox.num_waiting <= 8
        assert inbox.next_event_no < num_events
        async with streaming(server, worker) as (task, other):
            worker.emit(other, "fast")
            worker.finish(other)
            assert text_of((await task).text) == "fast"
        body = await asyncio.to_thread(read_to_the_end, slow)
    assert text_of(dechunked(body)) == "".join(f"<{number}>{text}" for number in range(num_events))


def slow_client(server: ApiServer) -> socket.socket:
    """A connection with small buffers: if the test reads nothing, its server soon can't send."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    connection.connect(("127.0.0.1", server.port))
    return connection


def raw_request(body: dict[str, Any]) -> bytes:
    """A chat completion as bytes on the wire."""
    encoded = json.dumps(body).encode()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(encoded)}\r\n\r\n"
    )
    return head.encode() + encoded


def read_to_the_end(connection: socket.socket) -> bytes:
    """All that the server sends until it closes."""
    connection.settimeout(30)
    received = bytearray()
    while part := connection.recv(65536):
        received += part
    return bytes(received)


def dechunked(answer: bytes) -> str:
    """The body of an answer with `transfer-encoding: chunked`."""
    rest, body = answer.partition(b"\r\n\r\n")[2], bytearray()
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body += rest[: int(size, 16)]
        rest = rest[int(size, 16) + 2 :]
    return body.decode()


async def test_a_stream_that_waits_says_so_and_an_error_then_is_an_event(
    redis_server: RedisServer, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responses, "KEEP_ALIVE_S", 0.1)
    with running_api(redis_server.url, first_event_wait_s=0.1) as server:
        async with (
            httpx.AsyncClient(base_url=server.url) as client,
            client.stream("POST", CHAT, json={**HELLO, "stream": True}) as response,
        ):
            lines = response.aiter_lines()
            claim = await eventually(worker.try_claim, "the request")
            for _ in range(2):
                assert await anext(lines) == ": queued"
            worker.fail(claim, "adapter_error", "it broke")
            rest = [line async for line in lines]
    assert response.status_code == 200
    events = [json.loads(line[6:]) for line in rest if line.startswith("data: {")]
    assert [event["error"]["code"] for event in events] == ["adapter_error"]
    assert rest[-2:] == ["data: [DONE]", ""]


def test_an_answer_in_one_piece_waits_for_its_status_however_long_it_is_queued(
    redis_server: RedisServer, worker: ScriptedWorker
) -> None:
    with running_api(redis_server.url, first_event_wait_s=0.05, queue_time_limit_s=0.4) as server:
        assert httpx.post(server.url + CHAT, json=HELLO).status_code == 503


def test_a_stream_whose_headers_are_out_learns_of_the_queue_time_limit_by_an_event(
    redis_server: RedisServer, worker: ScriptedWorker
) -> None:
    with running_api(redis_server.url, first_event_wait_s=0.05, queue_time_limit_s=0.4) as server:
        response = httpx.post(server.url + CHAT, json={**HELLO, "stream": True})
    error, done = decode_stream(response.text)
    assert json.loads(error)["error"]["code"] == "no_worker"
    assert (response.status_code, done) == (200, "[DONE]")
    assert worker.try_claim() is None


def test_a_request_that_somebody_deletes_from_its_queue_ends_with_an_error(
    redis_server: RedisServer, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_source, "GONE_WAIT_S", 0.2)

    def delete() -> None:
        wait_until(lambda: worker.connection.llen("rq:queue:base"))
        worker.connection.delete("rq:queue:base", *worker.connection.keys("rq:job:*"))

    deleting = threading.Thread(target=delete)
    with running_api(redis_server.url, queue_time_limit_s=0.4) as server:
        deleting.start()
        response = httpx.post(server.url + CHAT, json=HELLO, timeout=30)
        deleting.join()
    assert (response.status_code, response.json()["error"]["code"]) == (500, "generation_failed")
