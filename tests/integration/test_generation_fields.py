"""The fields of a generation through OpenAI's client: what the workers get, what the client gets."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
import redis
from openai.types.chat import ChatCompletionChunk

from shared.messages import ErrorInfo, FinishReason, PositionLogprobs, TokenLogprob, Usage
from tests.integration.api_harness import ApiServer, ScriptedWorker, running_api
from tests.redis_server import RedisServer

MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]


@pytest.fixture
def worker(connection: redis.Redis) -> ScriptedWorker:
    return ScriptedWorker(connection)


@pytest.fixture
def client(redis_server: RedisServer, worker: ScriptedWorker) -> Iterator[openai.OpenAI]:
    with running_api(redis_server.url, max_sequences_per_request=4) as api, client_of(api) as client:
        yield client


def client_of(api: ApiServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{api.url}/v1", api_key="none", max_retries=0)


def refusal(client: openai.OpenAI, **fields: Any) -> tuple[str | None, str | None]:
    """Returns code and parameter of the 400 that the client gets."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="base", messages=MESSAGES, **fields)
    return caught.value.code, caught.value.param


def test_the_choices_of_a_stream_come_as_they_are_generated_each_with_its_own_begin_and_end(
    client: openai.OpenAI, worker: ScriptedWorker
) -> None:
    options: Any = {"stream": True, "n": 2, "stream_options": {"include_usage": True}}
    with worker.answering_with(
        {"text": "b", "index": 1},
        {"text": "a", "index": 0},
        {"text": "B", "index": 1, "finish_reason": FinishReason.LENGTH},
        {"text": "A", "index": 0, "finish_reason": FinishReason.STOP, "usage": Usage(5, 4)},
    ) as claims:
        *chunks, last = client.chat.completions.create(model="base", messages=MESSAGES, **options)
    assert (claims[0].request.n, claims[0].request.schema_version) == (2, 2)
    assert [outline(chunk) for chunk in chunks] == [
        *[(1, "assistant", "", None), (1, None, "b", None), (0, "assistant", "", None), (0, None, "a", None)],
        *[(1, None, "B", None), (1, None, None, "length"), (0, None, "A", None), (0, None, None, "stop")],
    ]
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == 4


def outline(chunk: ChatCompletionChunk) -> tuple[int, str | None, str | None, str | None]:
    (choice,) = chunk.choices
    return choice.index, choice.delta.role, choice.delta.content, choice.finish_reason


def test_a_body_has_all_choices(client: openai.OpenAI, worker: ScriptedWorker) -> None:
    with worker.answering_with(
        {"text": "b", "index": 1, "finish_reason": FinishReason.LENGTH},
        {"text": "a", "index": 0, "finish_reason": FinishReason.STOP, "usage": Usage(5, 2)},
    ):
        completion = client.chat.completions.create(model="base", messages=MESSAGES, n=2)
    choices = [(one.index, one.message.content, one.finish_reason) for one in completion.choices]
    assert choices == [(0, "a", "stop"), (1, "b", "length")]


def test_a_request_of_too_many_choices_is_refused_by_name(client: openai.OpenAI) -> None:
    assert refusal(client, n=5) == ("invalid_request_error", "n")
    assert refusal(client, n=129) == ("invalid_request_error", "n")


def test_bias_and_penalties_reach_the_worker(client: openai.OpenAI, worker: ScriptedWorker) -> None:
    fields: Any = {"logit_bias": {"7": -100, "50256": 1.5}, "presence_penalty": -2, "frequency_penalty": 0.5}
    with worker.answering("a") as claims:
        client.chat.completions.create(model="base", messages=MESSAGES, **fields)
    sampling = claims[0].request.sampling
    assert sampling.logit_bias == {7: -100.0, 50256: 1.5}
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (-2.0, 0.5)
    assert claims[0].request.schema_version == 2


def test_fields_that_change_nothing_need_no_newer_worker(
    client: openai.OpenAI, worker: ScriptedWorker
) -> None:
    fields: Any = {"n": 1, "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0}
    with worker.answering("a") as claims:
        client.chat.completions.create(model="base", messages=MESSAGES, **fields)
    assert claims[0].request.schema_version == 1


def test_a_wrong_bias_or_penalty_is_refused_by_name(client: openai.OpenAI) -> None:
    assert refusal(client, presence_penalty=2.5) == ("invalid_request_error", "presence_penalty")
    assert refusal(client, frequency_penalty=-3) == ("invalid_request_error", "frequency_penalty")
    assert refusal(client, logit_bias={"7": 101}) == ("invalid_request_error", "logit_bias.7")


def test_a_bias_for_a_token_that_the_model_lacks_is_refused_by_the_worker(
    client: openai.OpenAI, worker: ScriptedWorker
) -> None:
    error = ErrorInfo(
        "invalid_request_error", "'logit_bias' names a token id that the model lacks.", "logit_bias"
    )
    with worker.answering_with({"text": "", "error": error}):
        assert refusal(client, logit_bias={"999": 1}) == ("invalid_request_error", "logit_bias")


POSITION = PositionLogprobs(TokenLogprob(7, b"\xe2", -0.5), (TokenLogprob(8, b"a", -0.25),))


def test_log_probabilities_reach_the_client_in_a_body_and_in_chunks(
    client: openai.OpenAI, worker: ScriptedWorker
) -> None:
    fields: Any = {"logprobs": True, "top_logprobs": 1}
    last = {"text": "a", "finish_reason": FinishReason.STOP, "usage": Usage(5, 1), "logprobs": (POSITION,)}
    with worker.answering_with(last) as claims:
        completion = client.chat.completions.create(model="base", messages=MESSAGES, **fields)
        chunks = list(client.chat.completions.create(model="base", messages=MESSAGES, stream=True, **fields))
    assert [claim.request.sampling.logprobs for claim in claims] == [1, 1]
    assert claims[0].request.schema_version == 4
    for logprobs in (completion.choices[0].logprobs, chunks[1].choices[0].logprobs):
        assert logprobs is not None
        assert logprobs.content is not None
        (position,) = logprobs.content
        assert (position.token, position.logprob, position.bytes) == ("\ufffd", -0.5, [0xE2])
        assert [(top.token, top.logprob) for top in position.top_logprobs] == [("a", -0.25)]


def test_wrong_numbers_of_alternatives_are_refused_by_name(client: openai.OpenAI) -> None:
    assert refusal(client, logprobs=True, top_logprobs=21) == ("invalid_request_error", "top_logprobs")
    assert refusal(client, top_logprobs=2) == ("invalid_request_error", "top_logprobs")


def test_the_extensions_of_the_distribution_reach_the_worker(
    client: openai.OpenAI, worker: ScriptedWorker
) -> None:
    extensions: dict[str, Any] = {
        "min_p": 0.1,
        "repeat_penalty": 1.2,
        "allowed_token_ids": [5, 6],
        "min_new_tokens": 3,
    }
    extensions |= {"stop_token_ids": [7], "include_stop_str_in_output": True}
    with worker.answering("a") as claims:
        client.chat.completions.create(model="base", messages=MESSAGES, extra_body=extensions)
    sampling = claims[0].request.sampling
    assert (sampling.stop_token_ids, sampling.includes_stop) == ((7,), True)
    assert (sampling.min_p, sampling.repetition_penalty, sampling.min_tokens) == (0.1, 1.2, 3)
    assert sampling.allowed_token_ids == (5, 6)
    assert claims[0].request.schema_version == 4


def test_wrong_extensions_of_the_distribution_are_refused_by_name(client: openai.OpenAI) -> None:
    for name, value in {"min_p": 2, "repetition_penalty": 0, "stop_token_ids": -1}.items():
        assert refusal(client, extra_body={name: value}) == ("invalid_request_error", name)
