"""Answers to clients and probes while no live worker serves a model, or none was ever there."""

import asyncio
from collections.abc import Iterator

import httpx
import openai
import pytest
import redis

from shared.queue import registry
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
from tests.waiting import wait_until

PATHS = ["/ready/base", "/ready/org/pirate", "/v1/models/base", "/v1/models/org/pirate"]


@pytest.fixture
def api(redis_server: RedisServer, connection: redis.Redis) -> Iterator[ApiServer]:
    with running_api(redis_server.url, no_worker_wait_s=0.4) as server:
        yield server


def test_before_the_first_worker_every_model_is_not_served_yet(api: ApiServer) -> None:
    answers = [httpx.get(api.url + path) for path in PATHS]
    answers += [httpx.post(api.url + CHAT, json={**HELLO, "model": name}) for name in ("base", "x")]
    for answer in answers:
        assert (answer.status_code, error_in(answer)["code"]) == (503, "not_served_yet")
        assert int(answer.headers["retry-after"]) >= 1
        assert "x-should-retry" not in answer.headers
    assert httpx.get(f"{api.url}/ready").status_code == 200
    assert httpx.get(f"{api.url}/v1/models").json()["data"] == []


def test_openais_client_waits_for_the_first_worker(api: ApiServer, connection: redis.Redis) -> None:
    def register(response: httpx.Response) -> None:
        if response.status_code == 503:
            ScriptedWorker(connection)
            response.headers["retry-after-ms"] = "1"

    http_client = httpx.Client(event_hooks={"response": [register]})
    with openai.OpenAI(base_url=f"{api.url}/v1", api_key="none", http_client=http_client) as client:
        assert client.models.retrieve("base").id == "base"


def test_a_model_is_ready_and_served_while_a_live_worker_has_it(
    api: ApiServer, connection: redis.Redis
) -> None:
    worker = ScriptedWorker(connection)
    for path in PATHS[:2]:
        answer = httpx.get(api.url + path)
        assert (answer.status_code, error_in(answer)["code"]) == (503, "no_worker")
        assert httpx.head(api.url + path).status_code == 503
    worker.report()
    worker.streams.serve({"base": ""})
    assert [httpx.get(api.url + path).status_code for path in [*PATHS[:2], "/ready/x"]] == [200, 503, 404]
    listed = httpx.get(f"{api.url}/v1/models").json()["data"]
    assert [(model["id"], model["served"]) for model in listed] == [(BASE.name, True), (ADAPTER.name, False)]
    assert httpx.get(f"{api.url}/v1/models/base").json() == listed[0]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_no_live_worker_serves_ends_after_one_wait_and_never_runs(
    api: ApiServer, connection: redis.Redis, stream: bool
) -> None:
    worker = ScriptedWorker(connection)
    with (
        openai.OpenAI(base_url=f"{api.url}/v1", api_key="none") as client,
        pytest.raises(openai.InternalServerError) as refused,
    ):
        client.chat.completions.create(
            model="base", messages=[{"role": "user", "content": "hi"}], stream=stream
        )
    assert refused.value.code == "no_worker"
    assert int(refused.value.response.headers["retry-after"]) >= 1
    assert len(connection.keys("rq:job:*")) == 1
    worker.report()
    assert worker.try_claim() is None


async def test_a_worker_that_comes_within_the_wait_gets_the_request(
    redis_server: RedisServer, connection: redis.Redis
) -> None:
    worker = ScriptedWorker(connection)
    with running_api(redis_server.url, no_worker_wait_s=20, queue_time_limit_s=30) as api:
        async with asking(api) as task:
            await eventually(lambda: connection.llen("rq:queue:base"), "the request")
            worker.report()
            worker.finish(await eventually(worker.try_claim, "the request"), "Paris")
            assert (await task).status_code == 200


async def test_a_request_whose_worker_serves_other_requests_first_waits_on(
    api: ApiServer, connection: redis.Redis
) -> None:
    worker = ScriptedWorker(connection)
    worker.report()
    async with asking(api) as task:
        await asyncio.wait([task], timeout=1)
        assert not task.done()
        worker.finish(await eventually(worker.try_claim, "the request"), "Paris")
        assert (await task).status_code == 200


def test_a_registry_that_lost_its_models_is_filled_by_its_workers(
    api: ApiServer, connection: redis.Redis
) -> None:
    ScriptedWorker(connection).report()
    connection.flushall()
    assert httpx.get(f"{api.url}/ready/base").status_code == 503
    registry.repair(connection, [BASE], fill=True)
    ScriptedWorker(connection).report()
    wait_until(lambda: httpx.get(f"{api.url}/ready/base").status_code == 200, what="the model")
