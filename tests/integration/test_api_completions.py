"""Completions over HTTP: the shapes of OpenAI's answers, and what the workers get to see."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import redis

from shared.messages import FinishReason, GenerationRequest
from tests.integration.api_harness import (
    ApiServer,
    ScriptedWorker,
    decode_stream,
    error_in,
    running_api,
)
from tests.redis_server import RedisServer

COMPLETIONS = "/v1/completions"
HELLO: dict[str, Any] = {"model": "base", "prompt": "hi"}


@pytest.fixture
def worker(connection: redis.Redis) -> ScriptedWorker:
    return ScriptedWorker(connection)


@pytest.fixture
def api(redis_server: RedisServer, worker: ScriptedWorker) -> Iterator[ApiServer]:
    with running_api(redis_server.url) as server:
        yield server


def client_of(api: ApiServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{api.url}/v1", api_key="none", max_retries=0)


def seen(api: ApiServer, worker: ScriptedWorker, **fields: Any) -> GenerationRequest:
    """The request that a worker gets for these fields."""
    with client_of(api) as client, client.completions.create(**HELLO | fields, stream=True):
        return worker.claim().request


def test_an_answer_in_one_piece_has_exactly_the_shape_of_openai(
    api: ApiServer, worker: ScriptedWorker
) -> None:
    with worker.answering("Hel", "", "lo"):
        response = httpx.post(api.url + COMPLETIONS, json=HELLO)
    body = response.json()
    assert response.status_code == 200
    assert body.pop("id").startswith("cmpl-")
    assert isinstance(body.pop("created"), int)
    assert body == {
        "object": "text_completion",
        "model": "base",
        "choices": [{"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 7,
            "total_tokens": 12,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


def test_a_stream_has_a_chunk_per_text_and_ends_with_usage_and_done(
    api: ApiServer, worker: ScriptedWorker
) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    with worker.answering("Hel", "", "lo"):
        response = httpx.post(api.url + COMPLETIONS, json=HELLO | options)
    *chunks, done = decode_stream(response.text)
    decoded = [json.loads(chunk) for chunk in chunks]
    assert done == "[DONE]"
    assert [(c["text"], c["finish_reason"]) for chunk in decoded for c in chunk["choices"]] == [
        ("Hel", None),
        ("lo", None),
        ("", "stop"),
    ]
    assert [chunk["usage"] and chunk["usage"]["total_tokens"] for chunk in decoded] == [None, None, None, 12]
    assert len({chunk["id"] for chunk in decoded}) == 1


def test_the_official_client_reads_both(api: ApiServer, worker: ScriptedWorker) -> None:
    with worker.answering("Hel", "lo"), client_of(api) as client:
        assert client.completions.create(**HELLO).choices[0].text == "Hello"
        chunks = client.completions.create(**HELLO, stream=True)
        assert "".join(chunk.choices[0].text for chunk in chunks) == "Hello"


def test_workers_get_the_prompts_as_they_were_sent_and_16_tokens_to_generate(
    api: ApiServer, worker: ScriptedWorker
) -> None:
    request = seen(api, worker, prompt=["a", "b"], temperature=0.5, stop="x", echo=True)
    assert (request.prompts, request.messages, request.echo) == (("a", "b"), [], True)
    assert (request.sampling.max_tokens, request.sampling.temperature) == (16, 0.5)
    assert request.sampling.stop == ("x",)
    assert seen(api, worker, prompt=[5, 6], model="org/pirate").prompts == ((5, 6),)


def test_a_detached_completion_is_resumed_and_aborted_on_its_own_path(
    api: ApiServer, worker: ScriptedWorker
) -> None:
    with httpx.Client(base_url=api.url, headers={"X-Lorelay-Detach": "true"}, timeout=30) as client:
        with client.stream("POST", COMPLETIONS, json=HELLO | {"stream": True}):
            claim = worker.claim()
        path = f"{COMPLETIONS}/{claim.held.request_id}"
        worker.emit(claim, "Hel", "lo")
        worker.finish(claim, reason=FinishReason.LENGTH)
        *chunks, done = [
            line.removeprefix("data: ")
            for line in client.get(f"{path}/stream").text.splitlines()
            if line.startswith("data: ")
        ]
        assert done == "[DONE]"
        assert "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks) == "Hello"
        assert error_in(client.get(f"/v1/chat/completions/{claim.held.request_id}/stream"))["code"] == (
            "request_not_found"
        )
        with client.stream("POST", COMPLETIONS, json=HELLO | {"stream": True}):
            claim = worker.claim()
        answer = client.delete(f"{COMPLETIONS}/{claim.held.request_id}").json()
        assert answer == {"id": claim.held.request_id, "object": "text_completion.deleted", "deleted": True}


def test_errors_name_the_field_and_reach_the_log_with_the_model(
    api: ApiServer, caplog: pytest.LogCaptureFixture
) -> None:
    response = httpx.post(api.url + COMPLETIONS, json={"model": "base", "prompt": {}})
    assert (response.status_code, error_in(response)["param"]) == (400, "prompt")
    too_long = httpx.post(api.url + COMPLETIONS, json=HELLO | {"prompt": [1] * 99})
    assert (too_long.status_code, error_in(too_long)["code"]) == (400, "context_length_exceeded")
