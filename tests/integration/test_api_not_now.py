"""An API on a server that says "not now": 503 on every route, and all goes on by itself when it is over."""

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import redis

from tests.chaos.proxy import Proxy
from tests.integration.api_harness import (
    CHAT,
    HELLO,
    ApiServer,
    ScriptedWorker,
    asking,
    decode_stream,
    error_in,
    eventually,
    running_api,
)
from tests.redis_server import RedisServer, free_port, server_binary
from tests.server_faults import BUSY_OPTIONS, FAULTS, orphaned
from tests.waiting import wait_until

READING = {"BUSY", "MASTERDOWN"}
"""States in which the server refuses reads, too."""
DETACH = {"X-Lorelay-Detach": "true"}
ROUTES = {
    "chat": ("POST", CHAT, HELLO),
    "resume": ("GET", f"{CHAT}/{{id}}/stream", None),
    "abort": ("DELETE", f"{CHAT}/{{id}}", None),
    "ready": ("GET", "/ready", None),
    "models": ("GET", "/v1/models", None),
    "model": ("GET", "/v1/models/base", None),
}


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with (
        tempfile.TemporaryDirectory(prefix="lorelay-") as folder,
        RedisServer(server_binary(), Path(folder), port=free_port(), options=BUSY_OPTIONS) as server,
    ):
        yield server


@pytest.fixture
def worker(server: RedisServer) -> Iterator[ScriptedWorker]:
    with redis.Redis.from_url(server.url) as connection:
        connection.flushall()
        yield ScriptedWorker(connection)


@pytest.fixture
def api(server: RedisServer, worker: ScriptedWorker) -> Iterator[ApiServer]:
    with running_api(server.url, redis_timeout_s=1) as api:
        yield api


async def start_detached(client: httpx.AsyncClient, worker: ScriptedWorker) -> str:
    """The id of a detached request that a worker runs."""
    asked = asyncio.create_task(client.post(CHAT, json={**HELLO, "stream": True}, headers=DETACH))
    claim = await eventually(worker.try_claim, "the request")
    asked.cancel()
    return str(claim.held.request_id)


@pytest.mark.parametrize("state", FAULTS)
async def test_every_route_that_needs_redis_answers_503_and_serves_again_afterwards(
    api: ApiServer, worker: ScriptedWorker, state: str
) -> None:
    needing = {name for name in ROUTES if state in READING or name not in ("models", "model")}
    async with httpx.AsyncClient(base_url=api.url, timeout=10) as client:
        request_id = await start_detached(client, worker)
        with FAULTS[state](worker.connection):
            answers = {
                name: await client.request(method, path.format(id=request_id), json=body)
                for name, (method, path, body) in ROUTES.items()
            }
        for name, answer in answers.items():
            assert answer.status_code == (503 if name in needing else 200), name
        for name in needing:
            code = "queue_out_of_memory" if state == "OOM" else "queue_unavailable"
            assert error_in(answers[name])["code"] == code
            assert int(answers[name].headers["retry-after"]) >= 1
            assert "x-should-retry" not in answers[name].headers
        assert (await client.get("/ready")).status_code == 200
        assert (await client.delete(f"{CHAT}/{request_id}")).status_code == 200


@pytest.mark.parametrize("state", FAULTS)
async def test_an_open_stream_goes_on_and_a_client_that_leaves_meanwhile_is_heard_afterwards(
    api: ApiServer, worker: ScriptedWorker, state: str
) -> None:
    async with asking(api, stream=True) as staying, asking(api, stream=True) as leaving:
        claims = [await eventually(worker.try_claim, "a request") for _ in range(2)]
        for claim in claims:
            worker.emit(claim, "one")
        with FAULTS[state](worker.connection):
            leaving.cancel()
            await eventually(lambda: len(api.relay.inboxes) == 1, "the departure")
            assert api.relay.is_aborting
        (kept,) = api.relay.inboxes
        (claim,) = [claim for claim in claims if claim.held.request_id == kept.request_id]
        (other,) = [other for other in claims if other is not claim]
        await eventually(lambda: worker.is_aborted(other), "the abort")
        worker.emit(claim, "two")
        worker.finish(claim)
        events = decode_stream((await staying).text)
    assert events[-1] == "[DONE]"
    assert all('"error"' not in event for event in events)


def test_an_api_that_lost_its_subscription_meanwhile_listens_again(
    server: RedisServer, worker: ScriptedWorker
) -> None:
    port = int(server.url.rpartition(":")[2])
    with Proxy(port) as proxy, running_api(proxy.url, redis_timeout_s=1) as api:
        channel = api.relay.queue.channel

        def is_heard() -> bool:
            return bool(dict(worker.connection.pubsub_numsub(channel))[channel.encode()])

        wait_until(is_heard, what="the subscription")
        with FAULTS["BUSY"](worker.connection):
            num_accepted = proxy.num_accepted
            proxy.reset_all()
            wait_until(lambda: proxy.num_accepted > num_accepted + 3, what="attempts to subscribe")
        wait_until(is_heard, what="the new subscription")


def test_an_api_that_starts_meanwhile_serves_as_soon_as_it_is_over(
    server: RedisServer, worker: ScriptedWorker
) -> None:
    with orphaned(worker.connection), running_api(server.url, redis_timeout_s=1) as api:
        assert httpx.get(f"{api.url}/ready").status_code == 503
        worker.connection.execute_command("REPLICAOF", "NO", "ONE")
        with worker.answering("Paris"):
            assert httpx.post(api.url + CHAT, json=HELLO).status_code == 200
