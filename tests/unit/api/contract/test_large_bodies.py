"""Bodies that take long to read: of many values, of many wrong ones, of long texts."""

import asyncio
import gc
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from api.chat_routes import parse_chat
from api.contract.chat_request import ChatCompletionRequest
from api.contract.json_body import MAX_NUM_VALUES
from api.contract.steps import StepRunner
from api.contract.strict import MAX_NUM_FIELDS, StrictModel, parse
from shared.errors import InvalidRequest

MAX_STOP_S = 0.05
"""Maximum time for which a body may stop the event loop."""
SLACK = 5
MANY = {f"k{number}": 1 for number in range(100_000)}
FEW = dict.fromkeys(list(MANY)[:10_000], 1)
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": ""}}
PART = {"type": "text", "text": ""}
TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {name: {"a": [1, 2.5]} for name in list(MANY)[:60]}},
}


@pytest.fixture(autouse=True)
def no_old_objects() -> Iterator[None]:
    """Keeps garbage collection away from the objects of other tests, as an API process does."""
    gc.freeze()
    yield
    gc.unfreeze()


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}


def chat(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", **message} for message in messages]}


TOO_MANY_VALUES = "more than 50000 values"
REFUSED = {
    "unknown fields": (body(**MANY), "supplied: k0."),
    "fewer unknown fields": (body(**FEW), "supplied: k0."),
    "unknown fields of a message": (chat({"content": "hi", **MANY}), r"supplied: messages\[0\].k0."),
    "unknown fields of each part": (
        chat({"content": [{**PART, **dict.fromkeys(list(MANY)[:40], 1)}] * 1_000}),
        r"supplied: messages\[0\].content\[0\].k0.",
    ),
    "unknown fields of options": (body(stream=True, stream_options=MANY), "supplied: stream_options.k0."),
    "metadata": (body(metadata=MANY), "'metadata': an object has at most 16 fields"),
    "a bias": (body(logit_bias=MANY), "'logit_bias': an object has at most 1000 fields"),
    "calls": (chat(*[{"role": "assistant", "tool_calls": [CALL] * 5}] * 10_000), TOO_MANY_VALUES),
    "parts": (chat(*[{"content": [PART] * 1_000}] * 130), TOO_MANY_VALUES),
    "numbers": ({"model": [0] * 1_000_000}, TOO_MANY_VALUES),
    "nested lists": ({"model": [[]] * 1_000_000}, TOO_MANY_VALUES),
    "objects": ({"model": [{}] * 1_000_000}, TOO_MANY_VALUES),
}
ACCEPTED = {
    "many messages": chat(*[{"content": "x" * 300}] * 10_000),
    "many calls": chat(*[{"role": "assistant", "tool_calls": [CALL] * 5}] * 1_000),
    "large tools": body(tool_choice="none", tools=[TOOL] * 128),
    "a text of commas": chat({"content": ",[{" * 1_000_000}),
    "a text of escapes": chat({"content": '\\",' * 600_000}),
    "texts that end in a backslash": chat(*[{"content": "\\"}, {"content": ',\\"' * 20}] * 5_000),
}


async def largest_stop_s(raw: bytes) -> tuple[float, list[dict[str, Any]] | InvalidRequest]:
    """Parses a body; returns the longest time of the processor between two turns of the event loop, too."""
    stops_s: list[float] = []

    async def beat() -> None:
        before = time.thread_time()
        while True:
            await asyncio.sleep(0)
            now = time.thread_time()
            stops_s.append(now - before)
            before = now

    heart = asyncio.create_task(beat())
    try:
        _, messages = await StepRunner().run(parse_chat(raw), is_long=True)
    except InvalidRequest as error:
        return max(stops_s, default=0), error
    finally:
        await asyncio.sleep(0)
        heart.cancel()
    return max(stops_s), messages


@pytest.mark.parametrize("name", REFUSED)
async def test_a_body_of_very_many_values_is_refused_before_all_are_read(name: str) -> None:
    value, message = REFUSED[name]
    stop_s, error = await largest_stop_s(json.dumps(value).encode())
    assert isinstance(error, InvalidRequest)
    with pytest.raises(InvalidRequest, match=message):
        raise error
    assert stop_s < SLACK * MAX_STOP_S


@pytest.mark.parametrize("name", ACCEPTED)
async def test_a_long_valid_body_is_read_in_steps(name: str) -> None:
    value = ACCEPTED[name]
    stop_s, messages = await largest_stop_s(json.dumps(value).encode())
    assert isinstance(messages, list)
    assert len(messages) == len(value["messages"])
    assert stop_s < SLACK * MAX_STOP_S


@pytest.mark.parametrize(
    "value", [[0] * 10_000, FEW, [FEW], [[0] * 10_000]], ids=["0s", "{}", "[{}]", "[[]]"]
)
def test_no_field_builds_an_error_for_each_of_many_values(value: Any) -> None:
    for field in [*ChatCompletionRequest.model_fields, "unknown"]:
        num_errors = 0
        try:
            ChatCompletionRequest.model_validate(body(**{field: value}))
        except ValidationError as error:
            num_errors = error.error_count()
        assert num_errors <= 1_001, field


def test_the_number_of_values_that_a_body_may_have_is_exact() -> None:
    for num_values, is_read in ((MAX_NUM_VALUES, True), (MAX_NUM_VALUES + 1, False)):
        raw = json.dumps({"model": ["a,b"] * (num_values - 1)}).encode()
        with pytest.raises(InvalidRequest) as caught:
            parse(ChatCompletionRequest, raw)
        assert ("values" not in caught.value.message) is is_read, num_values


def test_a_body_that_breaks_off_or_is_no_json_is_refused_as_such() -> None:
    for raw in (b'{"model": "m', b"[" * 100_000, b'{"a":' * 100_000, b"\xff" * 10, b'"' * 100_000):
        with pytest.raises(InvalidRequest):
            parse(ChatCompletionRequest, raw)


def test_no_model_has_as_many_fields_as_may_be_unknown() -> None:
    models = list(StrictModel.__subclasses__())
    for model in models:
        models += model.__subclasses__()
        assert len(model.model_fields) < MAX_NUM_FIELDS
