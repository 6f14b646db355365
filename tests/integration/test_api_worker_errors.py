"""Errors that a worker finds: with a status of their own before the first token, else as an event."""

import asyncio
import json
from collections.abc import Iterator

import msgspec
import openai
import pytest
import redis

from shared.queue import registry
from tests.integration.api_harness import (
    BASE,
    ApiServer,
    ScriptedWorker,
    asking,
    decode_stream,
    error_in,
    eventually,
    running_api,
)
from tests.redis_server import RedisServer


@pytest.fixture
def worker(connection: redis.Redis) -> ScriptedWorker:
    return ScriptedWorker(connection)


@pytest.fixture
def api(redis_server: RedisServer, worker: ScriptedWorker) -> Iterator[ApiServer]:
    with running_api(redis_server.url) as server:
        yield server


WORKER_ERRORS = [
    ("context_length_exceeded", 400, "messages", "false"),
    ("adapter_error", 500, None, "false"),
    ("generation_failed", 500, None, "false"),
    ("generation_timeout", 504, None, "false"),
    ("a_code_of_the_future", 500, None, None),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("code", "status", "param", "should_retry"), WORKER_ERRORS, ids=str)
async def test_an_error_before_the_first_token_has_its_own_status(
    api: ApiServer,
    worker: ScriptedWorker,
    code: str,
    status: int,
    param: str | None,
    should_retry: str | None,
    stream: bool,
) -> None:
    async with asking(api, stream=stream) as task:
        worker.fail(await eventually(worker.try_claim, "the request"), code, "so it is", param)
        response = await task
    error = error_in(response)
    assert (response.status_code, error["message"], error["param"]) == (status, "so it is", param)
    assert error["code"] == ("internal_error" if should_retry is None else code)
    assert response.headers.get("x-should-retry") == should_retry


async def test_a_prompt_that_can_not_fit_into_the_context_never_reaches_the_queue(
    api: ApiServer, worker: ScriptedWorker
) -> None:
    card = msgspec.structs.replace(BASE, max_token_bytes=10)
    registry.register(worker.connection, [card])
    async with asking(api, messages=[{"role": "user", "content": "x" * 991}]) as task:
        response = await task
    assert (response.status_code, error_in(response)["code"]) == (400, "context_length_exceeded")
    assert worker.connection.keys("rq:job:*") == []


@pytest.mark.parametrize("stream", [False, True])
async def test_nothing_is_left_in_redis_of_a_request_that_its_client_has_to_correct(
    api: ApiServer, worker: ScriptedWorker, stream: bool
) -> None:
    async with asking(api, stream=stream) as task:
        claim = await eventually(worker.try_claim, "the request")
        worker.fail(claim, "context_length_exceeded", "so it is", "messages")
        assert (await task).status_code == 400
    assert worker.connection.keys(f"*{claim.held.request_id}*") == []


async def test_an_error_in_the_middle_of_a_stream_is_its_last_event(
    api: ApiServer, worker: ScriptedWorker
) -> None:
    async with asking(api, stream=True) as task:
        claim = await eventually(worker.try_claim, "the request")
        worker.emit(claim, "some ", "text")
        worker.fail(claim, "adapter_error", "it broke")
        response = await task
    *chunks, error, done = decode_stream(response.text)
    assert response.status_code == 200
    assert len(chunks) == 3
    assert json.loads(error) == {
        "error": {"message": "it broke", "type": "server_error", "param": None, "code": "adapter_error"}
    }
    assert done == "[DONE]"


async def test_an_error_after_some_text_still_has_its_status_where_nothing_is_streamed(
    api: ApiServer, worker: ScriptedWorker
) -> None:
    async with asking(api) as task:
        claim = await eventually(worker.try_claim, "the request")
        worker.emit(claim, "some text")
        worker.fail(claim, "generation_failed", "it broke")
        response = await task
    assert (response.status_code, error_in(response)["code"]) == (500, "generation_failed")


async def test_openais_client_raises_on_an_error_in_the_middle_of_a_stream(
    api: ApiServer, worker: ScriptedWorker
) -> None:
    async with openai.AsyncOpenAI(base_url=f"{api.url}/v1", api_key="none") as client:
        asked = asyncio.create_task(
            client.chat.completions.create(
                model="base", messages=[{"role": "user", "content": "hi"}], stream=True
            )
        )
        claim = await eventually(worker.try_claim, "the request")
        worker.emit(claim, "some text")
        stream = await asked
        worker.fail(claim, "adapter_error", "it broke")
        with pytest.raises(openai.APIError, match="it broke"):
            [chunk async for chunk in stream]
