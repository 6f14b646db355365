"""Real `rq worker` processes that load, serve or have ended, as APIs and `lorelay status` see them."""

import asyncio
from collections.abc import Callable

import pytest
import redis
import redis.asyncio

from lorelay.status import read_status
from shared.errors import LorelayError
from shared.model_cards import ModelCard
from shared.queue import registry
from tests.deployment import BIN, Deployment, Process
from tests.redis_server import RedisServer
from tests.waiting import wait_until

Deploy = Callable[..., Deployment]


@pytest.fixture
def loading(deploy: Deploy, redis_server: RedisServer) -> Process:
    """A worker that loads its model until it is stopped."""
    command = [str(BIN / "rq"), "worker", "-u", redis_server.url, "--name", "loader"]
    worker = deploy().start([*command, "-w", "tests.integration.stopped_worker.HeldWhileLoading"])
    worker.wait_for(": loading")
    return worker


def test_a_real_worker_that_loads_is_shown_so_and_as_lost_once_it_is_killed(
    loading: Process, connection: redis.Redis
) -> None:
    def state() -> str:
        (worker,) = read_status(connection).workers
        return worker.state

    assert state() == "loading"
    loading.kill()
    wait_until(lambda: state() == "lost", what="the end of its connection")


def test_a_model_that_a_worker_loads_is_not_served_yet_until_the_worker_ends(
    loading: Process, redis_server: RedisServer, connection: redis.Redis
) -> None:
    registry.register(connection, [ModelCard("other", "other", "/m", "v", 1, 9)])

    async def refusal(name: str) -> str:
        async with redis.asyncio.Redis.from_url(redis_server.url) as client:
            with pytest.raises(LorelayError) as refused:
                await registry.fetch_card(client, name)
        return refused.value.code

    names = ["tiny", "a", "b", "c"]
    assert [asyncio.run(refusal(name)) for name in names] == ["not_served_yet"] * 3 + ["model_not_found"]
    assert loading.stop() == 0
    assert asyncio.run(refusal("tiny")) == "model_not_found"
