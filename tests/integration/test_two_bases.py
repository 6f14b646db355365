"""Two bases with an adapter each, behind one API on one server."""

from collections.abc import Iterator

import httpx
import msgspec
import pytest
import redis

from lorelay.status import read_status
from shared.errors import RegistryConflict
from shared.queue.names import queue_name
from tests.integration.api_harness import (
    ADAPTER,
    BASE,
    CHAT,
    HELLO,
    ApiServer,
    ScriptedWorker,
    asking,
    error_in,
    eventually,
    running_api,
)
from tests.redis_server import RedisServer

LARGE = msgspec.structs.replace(BASE, name="Org/Large", base="Org/Large", source="/models/large", version="c")
LEGAL = msgspec.structs.replace(ADAPTER, name="legal", adapter_name="legal", base="Org/Large", version="d")


@pytest.fixture
def small(connection: redis.Redis) -> ScriptedWorker:
    return ScriptedWorker(connection)


@pytest.fixture
def large(connection: redis.Redis) -> ScriptedWorker:
    return ScriptedWorker(connection, (LARGE, LEGAL), "large")


@pytest.fixture
def api(redis_server: RedisServer, small: ScriptedWorker, large: ScriptedWorker) -> Iterator[ApiServer]:
    with running_api(redis_server.url, no_worker_wait_s=0.4, max_total_queue_depth=1) as server:
        yield server


async def test_each_request_runs_on_a_worker_of_its_base(
    api: ApiServer, small: ScriptedWorker, large: ScriptedWorker
) -> None:
    for worker in (small, large):
        worker.report()
    for card in (BASE, LARGE, ADAPTER, LEGAL):
        own, other = (small, large) if card.base == BASE.base else (large, small)
        async with asking(api, model=card.name) as task:
            claim = await eventually(own.try_claim, "the request")
            assert other.try_claim() is None
            own.finish(claim, f"by {card.base}")
            answer = (await task).json()
        assert (answer["model"], claim.request.base) == (card.name, card.base)
        assert answer["choices"][0]["message"]["content"] == f"by {card.base}"


async def test_a_full_queue_or_a_missing_worker_of_one_base_leaves_the_other_alone(
    api: ApiServer, small: ScriptedWorker, large: ScriptedWorker
) -> None:
    small.report()
    assert error_in(httpx.post(api.url + CHAT, json={**HELLO, "model": "legal"}))["code"] == "no_worker"
    ready = {
        name: httpx.get(f"{api.url}/ready/{name}").status_code for name in ("base", "legal", "Org/Large")
    }
    assert ready == {"base": 200, "legal": 503, "Org/Large": 503}
    large.report()
    async with asking(api, model="legal") as waiting:
        queue = f"rq:queue:{queue_name(LEGAL.base, LEGAL.name)}"
        await eventually(lambda: large.connection.llen(queue), "the request")
        full = httpx.post(api.url + CHAT, json={**HELLO, "model": "Org/Large"})
        assert error_in(full)["code"] == "queue_full"
        async with asking(api) as task:
            small.finish(await eventually(small.try_claim, "the request"), "Paris")
            assert (await task).status_code == 200
        large.finish(await eventually(large.try_claim, "the request"), "law")
        assert (await waiting).status_code == 200


def test_models_and_status_show_both_bases(
    api: ApiServer, small: ScriptedWorker, large: ScriptedWorker, connection: redis.Redis
) -> None:
    large.report()
    listed = httpx.get(f"{api.url}/v1/models").json()["data"]
    assert [(model["id"], model["parent"], model["served"]) for model in listed] == [
        ("Org/Large", None, True),
        ("legal", "Org/Large", True),
        ("base", None, False),
        ("org/pirate", "base", False),
    ]
    status = read_status(connection)
    assert {model.name: model.num_workers for model in status.bases} == {"Org/Large": 1, "base": 0}
    assert {model.name: model.num_workers for model in status.adapters} == {"legal": 1, "org/pirate": 0}


def test_an_adapter_name_that_another_base_has_is_refused(
    small: ScriptedWorker, connection: redis.Redis
) -> None:
    taken = msgspec.structs.replace(LEGAL, name=ADAPTER.name, adapter_name=ADAPTER.name)
    with pytest.raises(RegistryConflict, match=r"'org/pirate' is registered as .* of base 'base'"):
        ScriptedWorker(connection, (LARGE, taken), "large")
