"""The time limits of one connection, with a clock, a transport and an application of the test."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest
import uvicorn
from uvicorn.server import ServerState

from api.connections import ConnectionGuard
from shared.settings import ApiSettings

GET = b"GET / HTTP/1.1\r\nhost: x\r\n"
POST = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n"
LONG_S = 1_000.0


class FakeTransport:
    """Keeps what is written, and notes whether it was closed."""

    def __init__(self) -> None:
        self.written = b""
        self.is_open = True

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        self.is_open = False

    abort = close

    def is_closing(self) -> bool:
        return not self.is_open

    def get_write_buffer_size(self) -> int:
        return 0

    def get_extra_info(self, name: str) -> None:
        return None

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


class Streams:
    """An application whose responses begin at once, and end when the test says."""

    def __init__(self) -> None:
        self.num_begun = 0
        self.may_end = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        self.num_begun += 1
        may_end, self.may_end = self.may_end, asyncio.Event()
        length = [(b"content-length", b"2")]
        await send({"type": "http.response.start", "status": 200, "headers": length})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        await may_end.wait()
        await send({"type": "http.response.body", "body": b"b"})


class Line:
    """A client's connection on which a response streams."""

    def __init__(self) -> None:
        self.now = 0.0
        self.app = Streams()
        self.end = self.app.may_end
        guard = ConnectionGuard(ApiSettings(), clock=lambda: self.now)
        config = uvicorn.Config(cast("Any", self.app), lifespan="off", log_config=None, access_log=False)
        config.load()
        self.sweep = guard.sweep
        self.transport = FakeTransport()
        self.connection = guard.protocol(config=config, server_state=ServerState(), app_state={})
        self.connection.connection_made(cast("Any", self.transport))

    def send(self, data: bytes) -> None:
        self.connection.data_received(data)

    async def pass_time(self, seconds: float) -> None:
        """Lets the tasks run that are due, then time pass."""
        for _ in range(10):
            await asyncio.sleep(0)
        self.now += seconds
        self.sweep()

    def close(self) -> None:
        self.connection.connection_lost(None)
        self.end.set()
        self.app.may_end.set()


@pytest.mark.parametrize("sent", [b"\r\n", GET, GET + b"\r\n", b"GET", POST, POST + b"x"])
async def test_what_a_client_sends_during_a_response_does_not_end_the_response(sent: bytes) -> None:
    line = Line()
    line.send(GET + b"\r\n")
    await line.pass_time(1)
    for start in range(len(sent)):
        line.send(sent[start : start + 1])
    await line.pass_time(LONG_S)
    await line.pass_time(LONG_S)
    assert line.transport.is_open
    line.end.set()
    await line.pass_time(0)
    assert line.transport.is_open
    assert line.transport.written.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"\r\n\r\nab" in line.transport.written
    line.close()


@pytest.mark.parametrize("sent", [GET, POST, POST + b"x"])
async def test_the_limit_of_a_part_that_came_during_a_response_begins_at_its_end(sent: bytes) -> None:
    line = Line()
    line.send(GET + b"\r\n")
    await line.pass_time(1)
    line.send(sent)
    await line.pass_time(LONG_S)
    line.end.set()
    await line.pass_time(1)
    assert line.transport.is_open
    await line.pass_time(LONG_S)
    assert not line.transport.is_open or b" 408 " in line.transport.written
    line.close()


async def test_a_second_request_that_came_during_a_response_is_served() -> None:
    line = Line()
    line.send(GET + b"\r\n" + GET + b"\r\n")
    await line.pass_time(LONG_S)
    assert line.app.num_begun == 1
    line.end.set()
    await line.pass_time(LONG_S)
    await line.pass_time(LONG_S)
    assert line.app.num_begun == 2
    assert line.transport.is_open
    line.close()
