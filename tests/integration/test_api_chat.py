"""Chat completions over HTTP: the shapes of OpenAI's answers, and what the workers get to see."""

import asyncio
import json
import logging
import re
from collections.abc import Iterator

import httpx
import openai
import pytest
import redis

from shared.messages import FinishReason, TemplateInputs, Timings, Usage
from tests.integration.api_harness import (
    ADAPTER,
    CHAT,
    HELLO,
    ApiServer,
    ScriptedWorker,
    asking,
    decode_stream,
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


def test_an_answer_in_one_piece_has_exactly_the_shape_of_openai(
    api: ApiServer, worker: ScriptedWorker
) -> None:
    with worker.answering("Hel", "", "lo"):
        response = httpx.post(api.url + CHAT, json=HELLO)
    body = response.json()
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json; charset=utf-8"
    assert response.headers["x-request-id"] == body["id"]
    assert body.pop("id").startswith("chatcmpl-")
    assert isinstance(body.pop("created"), int)
    assert body == {
        "object": "chat.completion",
        "model": "base",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 7,
            "total_tokens": 12,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


def _chunks(api: ApiServer, worker: ScriptedWorker, **fields: object) -> list[dict[str, object]]:
    """The chunks of a stream of 'Hel', '' and 'lo', without what is the same in all of them."""
    with worker.answering("Hel", "", "lo"):
        response = httpx.post(api.url + CHAT, json={**HELLO, "stream": True, **fields})
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *chunks, done = decode_stream(response.text)
    assert done == "[DONE]"
    decoded = [json.loads(chunk) for chunk in chunks]
    heads = [
        (chunk.pop("id"), chunk.pop("created"), chunk.pop("object"), chunk.pop("model")) for chunk in decoded
    ]
    assert len(set(heads)) == 1
    assert heads[0] == (response.headers["x-request-id"], heads[0][1], "chat.completion.chunk", "base")
    return decoded


def _choice(delta: dict[str, str], finish_reason: str | None = None) -> list[dict[str, object]]:
    return [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}]


PIECES = [
    _choice({"role": "assistant", "content": ""}),
    _choice({"content": "Hel"}),
    _choice({"content": "lo"}),
    _choice({}, "stop"),
]


def test_a_stream_has_role_then_text_then_finish_reason_and_no_usage(
    api: ApiServer, worker: ScriptedWorker
) -> None:
    assert _chunks(api, worker) == [{"choices": choices} for choices in PIECES]


def test_include_usage_puts_null_into_every_chunk_and_the_counts_into_one_more(
    api: ApiServer, worker: ScriptedWorker
) -> None:
    usage = {
        "prompt_tokens": 5,
        "completion_tokens": 7,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert _chunks(api, worker, stream_options={"include_usage": True}) == [
        *({"choices": choices, "usage": None} for choices in PIECES),
        {"choices": [], "usage": usage},
    ]


def test_include_usage_false_is_like_leaving_it_out(api: ApiServer, worker: ScriptedWorker) -> None:
    assert _chunks(api, worker, stream_options={"include_usage": False}) == _chunks(api, worker)


def test_openais_client_gets_a_completion(api: ApiServer, worker: ScriptedWorker) -> None:
    with openai.OpenAI(base_url=f"{api.url}/v1", api_key="none") as client, worker.answering("Paris"):
        completion = client.chat.completions.create(
            model="base", messages=[{"role": "user", "content": "hi"}], temperature=0.8, top_p=0.8
        )
    assert type(completion).__name__ == "ChatCompletion"
    assert completion.choices[0].message.content == "Paris"
    assert completion.usage is not None
    assert completion.usage.total_tokens == 12
    assert completion._request_id == completion.id


async def test_openais_async_client_gets_a_stream(api: ApiServer, worker: ScriptedWorker) -> None:
    async with openai.AsyncOpenAI(base_url=f"{api.url}/v1", api_key="none") as client:
        with worker.answering("The ", "capital"):
            stream = await client.chat.completions.create(
                model=ADAPTER.name, messages=[{"role": "user", "content": "hi"}], stream=True
            )
            texts = [chunk.choices[0].delta.content async for chunk in stream]
    assert texts == ["", "The ", "capital", None]


def test_openais_client_lists_and_describes_the_models(api: ApiServer) -> None:
    with openai.OpenAI(base_url=f"{api.url}/v1", api_key="none") as client:
        listed = [model.to_dict() for model in client.models.list().data]
        assert client.models.retrieve("org/pirate").to_dict() == listed[1]
    assert listed == [
        {
            "id": "base",
            "object": "model",
            "created": 1,
            "owned_by": "lorelay",
            "root": "base",
            "parent": None,
            "max_model_len": 99,
            "served": False,
        },
        {
            "id": "org/pirate",
            "object": "model",
            "created": 2,
            "owned_by": "lorelay",
            "root": "org/pirate",
            "parent": "base",
            "max_model_len": 99,
            "served": False,
        },
    ]


async def test_a_worker_sees_all_that_the_client_asked_for(api: ApiServer, worker: ScriptedWorker) -> None:
    body = {
        "model": ADAPTER.name,
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "user", "content": "hi", "name": "ann"},
        ],
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "max_tokens": 3,
        "max_completion_tokens": 8,
        "min_tokens": 2,
        "ignore_eos": True,
        "stop": ["x", "y"],
        "seed": 11,
        "cache_salt": "of one chat",
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "tool_choice": "none",
        "chat_template_kwargs": {"enable_thinking": False},
    }
    async with httpx.AsyncClient(base_url=api.url) as client:
        asking = asyncio.create_task(client.post(CHAT, json=body))
        claim = await eventually(worker.try_claim, "the request")
        worker.finish(claim, "done", FinishReason.LENGTH)
        answer = (await asking).json()
    request, sampling = claim.request, claim.request.sampling
    assert (request.model, request.base, request.adapter_name) == (ADAPTER.name, "base", ADAPTER.name)
    assert request.adapter_version == ADAPTER.version
    assert (request.generation_limit_s, request.wait_limit_s, request.tenant) == (30, 30, "")
    assert request.messages == [
        {"role": "system", "content": "ab"},
        {"role": "user", "content": "hi", "name": "ann"},
    ]
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 40)
    assert (sampling.max_tokens, sampling.min_tokens, sampling.ignore_eos) == (8, 2, True)
    assert (sampling.stop, sampling.seed) == (("x", "y"), 11)
    assert request.cache_salt == "of one chat"
    tools: list[dict[str, object]] = [{"type": "function", "function": {"name": "f"}}]
    assert request.template_inputs == TemplateInputs(tools, {"enable_thinking": False})
    assert answer["id"] == request.request_id
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_each_request_without_a_seed_gets_one_of_its_own(
    api: ApiServer, worker: ScriptedWorker
) -> None:
    seeds = set()
    async with httpx.AsyncClient(base_url=api.url) as client:
        for _ in range(2):
            asking = asyncio.create_task(client.post(CHAT, json=HELLO))
            claim = await eventually(worker.try_claim, "the request")
            worker.finish(claim)
            assert (await asking).status_code == 200
            seeds.add(claim.request.sampling.seed)
    assert len(seeds) == 2
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_request_leaves_one_line_in_the_log_and_never_its_prompt(
    api: ApiServer, worker: ScriptedWorker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    secret = "the secret of the lighthouse"
    body = {**HELLO, "messages": [{"role": "user", "content": secret}]}
    with worker.answering("Paris"):
        request_id = httpx.post(api.url + CHAT, json=body).json()["id"]
    ends = [record for record in caplog.records if getattr(record, "action", "") == "request_end"]
    assert [(end.request_id, end.model, end.outcome, end.status) for end in ends] == [
        (request_id, "base", "stop", 200)
    ]
    assert secret not in caplog.text
    assert not any(secret in str(record.__dict__) for record in caplog.records)


async def test_the_line_of_a_request_tells_where_its_time_went(
    api: ApiServer, worker: ScriptedWorker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    timings = Timings(1.25, 0.5, 0.125, 2, 3, "host.42")
    for times in (timings, Timings(1.25, 0.5), None):
        async with asking(api) as task:
            claim = await eventually(worker.try_claim, "the request")
            worker.emit(claim, "", finish_reason=FinishReason.STOP, usage=Usage(1, 1), timings=times)
            assert "timings" not in (await task).text
    records = [record for record in caplog.records if getattr(record, "action", "") == "request_end"]
    ends = [record.getMessage().partition(" queue=")[2] for record in records]
    assert ends == [
        "1.250 load=0.125 encode=0.500 prefill=2.000 decode=3.000 worker=host.42",
        "1.250 load=- encode=0.500 prefill=- decode=- worker=-",
        "- load=- encode=- prefill=- decode=- worker=-",
    ]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_id_of_the_client_is_in_response_and_log_beside_that_of_the_request(
    redis_server: RedisServer, worker: ScriptedWorker, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    caplog.set_level(logging.INFO)
    with running_api(redis_server.url) as api:
        async with httpx.AsyncClient(base_url=api.url, headers={"X-Request-Id": "trace-7"}) as client:
            for is_good in (True, False):
                task = asyncio.create_task(client.post(CHAT, json={**HELLO, "stream": stream}))
                claim = await eventually(worker.try_claim, "the request")
                if is_good:
                    worker.finish(claim, "Paris")
                else:
                    worker.fail(claim, "context_length_exceeded", "too long", "messages")
                response = await task
                assert response.headers.get_list("x-request-id") == ["trace-7"]
                if is_good:
                    assert response.headers["x-lorelay-request-id"] == claim.held.request_id
    ends = [record for record in caplog.records if getattr(record, "action", "") == "request_end"]
    lines = [end.getMessage() for end in ends]
    assert re.match(
        r"request chatcmpl-\w+ to base ended: stop, 200, .* id=trace-7 model=base code=-", lines[0]
    )
    assert "id=trace-7 model=base code=context_length_exceeded param=messages" in lines[1]
    assert (ends[1].request_id, ends[1].status) == (claim.held.request_id, 400)  # type: ignore[attr-defined]


async def test_many_streams_at_once_each_get_their_own_text(api: ApiServer, worker: ScriptedWorker) -> None:
    num_streams, num_tokens = 32, 20
    async with httpx.AsyncClient(
        base_url=api.url, limits=httpx.Limits(max_connections=num_streams)
    ) as client:
        asking = [
            asyncio.create_task(client.post(CHAT, json={**HELLO, "seed": seed, "stream": True}))
            for seed in range(num_streams)
        ]
        claims = [await eventually(worker.try_claim, "a request") for _ in asking]
        for token in range(num_tokens):
            for claim in claims:
                worker.emit(claim, f"{claim.request.sampling.seed}:{token} ")
        for claim in claims:
            worker.finish(claim)
        bodies = [(await task).text for task in asking]
    for seed, body in enumerate(bodies):
        assert _text(body) == "".join(f"{seed}:{token} " for token in range(num_tokens))


def _text(body: str) -> str:
    chunks = [json.loads(data) for data in decode_stream(body)[:-1]]
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
