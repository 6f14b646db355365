"""The relay by itself, on a real server: its subscriber's connection and its reading of logs."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.asyncio

from api.relay.queue_client import QueueClient
from api.relay.relay import Relay
from shared.errors import GenerationFailed, ServerDraining
from shared.messages import GenerationRequest, SamplingParams, StreamEvent
from shared.queue import keys
from shared.settings import ApiSettings, RedisSettings
from tests.integration.api_harness import ScriptedWorker, eventually
from tests.redis_server import RedisServer, server_binary
from tests.streams import make_request

REQUEST_ID = "chatcmpl-1"
FOREVER = float("inf")
CLOSED = "unable to perform operation on <TCPTransport closed=True>; the handler is closed"


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A server that a test may freeze and kill."""
    with RedisServer(server_binary(), tmp_path) as server:
        yield server


@pytest.fixture
def own_connection(own_server: RedisServer) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(own_server.url) as connection:
        yield connection


class FaultyQueue(QueueClient):
    """A queue client that raises errors when a test says so, and records each abort with its failure."""

    def __init__(self, redis_settings: RedisSettings, settings: ApiSettings) -> None:
        super().__init__(redis_settings, settings)
        self.errors: dict[str, list[Exception]] = {"abort": [], "read_logs": [], "renew_lease": []}
        """Errors that the next calls of a method raise."""
        self.aborts: list[tuple[str, Exception | None]] = []

    def _fail_if_told(self, method: str) -> None:
        if self.errors[method]:
            raise self.errors[method].pop()

    async def abort(self, request_id: str) -> str:
        try:
            self._fail_if_told("abort")
            state = await super().abort(request_id)
        except Exception as error:
            self.aborts.append((request_id, error))
            raise
        self.aborts.append((request_id, None))
        return state

    async def read_logs(
        self, positions: Sequence[tuple[str, int]], max_num_events: int
    ) -> list[list[StreamEvent] | None]:
        self._fail_if_told("read_logs")
        return await super().read_logs(positions, max_num_events)

    async def renew_lease(self) -> None:
        self._fail_if_told("renew_lease")
        await super().renew_lease()


def queue_of(relay: Relay) -> FaultyQueue:
    """The queue client of a `running_relay`."""
    assert isinstance(relay.queue, FaultyQueue)
    return relay.queue


@contextlib.asynccontextmanager
async def running_relay(server: RedisServer, *, ping_s: float = 5, **settings: Any) -> AsyncIterator[Relay]:
    """A relay in this event loop, with a `FaultyQueue`."""
    redis_settings, api_settings = RedisSettings(redis_url=server.url), ApiSettings(**settings)
    relay = Relay(FaultyQueue(redis_settings, api_settings), redis_settings, api_settings, ping_s=ping_s)
    relay.start()
    try:
        yield relay
    finally:
        await relay.close()


def subscribers(connection: redis.Redis) -> list[dict[str, str]]:
    """The connections that are subscribed to something."""
    return [client for client in connection.client_list() if client["sub"] == "1"]


def actions(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The actions that the relay logged."""
    return [record.action for record in caplog.records if record.name == "api.relay.relay"]


async def test_a_connection_on_which_the_server_answers_no_more_is_given_up(
    own_server: RedisServer, own_connection: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with running_relay(own_server, ping_s=0.1, redis_timeout_s=0.2):
        (before,) = await eventually(lambda: subscribers(own_connection), "the subscriber")
        own_server.freeze()
        await eventually(lambda: actions(caplog), "the end of its patience")
        own_server.thaw()
        await eventually(lambda: actions(caplog) == ["redis_lost", "redis_back"], "the recovery")
        (after,) = await eventually(lambda: subscribers(own_connection), "the subscriber")
    assert before["id"] != after["id"]


async def test_a_quiet_connection_is_kept(
    own_server: RedisServer, own_connection: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    async with running_relay(own_server, ping_s=0.05):
        (before,) = await eventually(lambda: subscribers(own_connection), "the subscriber")

        def has_pinged_often() -> bool:
            return own_connection.info("commandstats").get("cmdstat_ping", {}).get("calls", 0) >= 4

        own_connection.config_resetstat()
        await eventually(has_pinged_often, "four pings")
        (after,) = subscribers(own_connection)
    assert before["id"] == after["id"]
    assert not actions(caplog)


async def test_an_outage_is_logged_once(
    own_server: RedisServer, own_connection: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with running_relay(own_server, max_silence_s=0.02, redis_timeout_s=0.2) as relay:
        await eventually(lambda: subscribers(own_connection), "the subscriber")
        with relay.open_inbox(REQUEST_ID):
            own_server.kill()
            await eventually(lambda: actions(caplog), "the outage")
            own_server.start()
            await eventually(lambda: len(actions(caplog)) > 1, "the recovery")
    assert actions(caplog) == ["redis_lost", "redis_back"]


async def test_an_abort_that_finds_no_redis_is_made_up_for(tmp_path: Path) -> None:
    server = RedisServer(server_binary(), tmp_path, append_only=True, options=("--appendfsync", "always"))
    with server, redis.Redis.from_url(server.url) as connection:
        worker = ScriptedWorker(connection)
        async with running_relay(server, redis_timeout_s=0.2) as relay:
            request = GenerationRequest(REQUEST_ID, "base", "base", SamplingParams())
            await relay.queue.enqueue(request, client="", until=FOREVER)
            claim = worker.claim()
            server.kill()
            relay.abort_soon(REQUEST_ID)
            await eventually(lambda: len(queue_of(relay).aborts) > 1, "two attempts")
            server.start()
            await eventually(lambda: worker.is_aborted(claim), "the abort")


async def test_aborts_and_log_readings_go_on_after_an_exception_that_nobody_foresaw(
    redis_server: RedisServer, connection: redis.Redis
) -> None:
    connection.rpush(keys.log(REQUEST_ID), StreamEvent(0, text="fine").encode())
    async with running_relay(redis_server, max_silence_s=0.02) as relay:
        queue, unforeseen = queue_of(relay), ZeroDivisionError()
        queue.errors |= {"read_logs": [unforeseen], "abort": [unforeseen]}
        with relay.open_inbox(REQUEST_ID) as inbox:
            assert [event.text for event in await inbox.get(FOREVER)] == ["fine"]
        relay.abort_soon("first")
        relay.abort_soon("second")
        both = [("first", unforeseen), ("second", None)]
        await eventually(lambda: queue.aborts == both, "both aborts")


async def test_an_event_that_cannot_be_read_ends_its_own_request_only(
    redis_server: RedisServer, connection: redis.Redis
) -> None:
    connection.rpush(keys.log("broken"), b'{"event_no": "zero"}')
    connection.rpush(keys.log("whole"), StreamEvent(0, text="fine").encode())
    async with running_relay(redis_server, max_silence_s=0.02) as relay:
        with relay.open_inbox("broken") as broken, relay.open_inbox("whole") as whole:
            assert [event.text for event in await whole.get(FOREVER)] == ["fine"]
            with pytest.raises(GenerationFailed):
                await broken.get(FOREVER)


async def test_a_published_event_that_cannot_be_read_ends_its_own_request_only(
    redis_server: RedisServer, connection: redis.Redis
) -> None:
    async with running_relay(redis_server, max_silence_s=1_000) as relay:
        with relay.open_inbox("broken") as broken, relay.open_inbox("whole") as whole:
            (channel,) = await eventually(
                lambda: connection.pubsub_channels("lorelay:events:*"), "the channel"
            )
            lines = [b"broken {", b"unknown {", b"whole " + StreamEvent(0, text="fine").encode()]
            connection.publish(channel, b"\n".join(lines))
            assert [event.text for event in await whole.get(FOREVER)] == ["fine"]
            with pytest.raises(GenerationFailed):
                await broken.get(FOREVER)


async def test_a_log_longer_than_an_inbox_is_read_in_pages(
    redis_server: RedisServer, connection: redis.Redis
) -> None:
    connection.rpush(keys.log(REQUEST_ID), *(StreamEvent(number).encode() for number in range(25)))
    async with running_relay(redis_server, max_silence_s=1_000, max_inbox_events=10) as relay:
        with relay.open_inbox(REQUEST_ID) as inbox:
            pages = []
            while sum(pages) < 25:
                pages.append(len(await inbox.get(FOREVER)))
    assert pages == [10, 10, 5]


async def test_closing_ends_what_waits_and_leaves_no_connection(
    own_server: RedisServer, own_connection: redis.Redis
) -> None:
    async with running_relay(own_server) as relay:
        await relay.queue.ping()

        async def wait() -> None:
            with relay.open_inbox(REQUEST_ID) as inbox:
                await inbox.get(FOREVER)

        waiting = asyncio.create_task(wait())
        await eventually(lambda: relay.inboxes, "the inbox")
        await relay.close()
        with pytest.raises(ServerDraining):
            await waiting
    await eventually(lambda: len(own_connection.client_list()) == 1, "the end of all connections but ours")


async def test_a_draining_relay_takes_nothing_new_and_ends_what_is_open_when_its_time_is_over(
    redis_server: RedisServer, connection: redis.Redis
) -> None:
    async with running_relay(redis_server, api_drain_s=0.2) as relay:
        with relay.open_inbox(REQUEST_ID) as inbox:
            relay.drain()
            queue = relay.queue
            for attempt in (queue.ping(), queue.enqueue(make_request(), "", queue.deadline())):
                with pytest.raises(ServerDraining):
                    await attempt
            with pytest.raises(ServerDraining):
                await inbox.get(FOREVER)
    assert not connection.keys("rq:job:*")


async def test_an_api_keeps_its_lease_after_an_exception_that_nobody_foresaw(
    redis_server: RedisServer, connection: redis.Redis
) -> None:
    async with running_relay(redis_server, api_lease_s=0.6) as relay:
        queue = queue_of(relay)
        queue.errors["renew_lease"] = [ZeroDivisionError(), RuntimeError(CLOSED)]
        await eventually(lambda: not queue.errors["renew_lease"], "two failures")
        connection.delete(queue.channel)
        await eventually(lambda: connection.exists(queue.channel), "the renewed lease")


async def test_a_connection_that_uvloop_finds_closed_is_replaced(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_relay(redis_server) as relay:
        send, errors = redis.asyncio.UnixDomainSocketConnection.send_packed_command, [RuntimeError(CLOSED)]

        async def breaks_once(self: Any, *args: Any, **options: Any) -> None:
            if errors:
                raise errors.pop()
            await send(self, *args, **options)

        monkeypatch.setattr(redis.asyncio.UnixDomainSocketConnection, "send_packed_command", breaks_once)
        await relay.queue.ping()
        assert not errors
