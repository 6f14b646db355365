"""The codec of messages, and the names that stand in two places."""

import re
from importlib import resources
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import errors
from shared.errors import ERRORS_BY_CODE, LorelayError, from_info
from shared.messages import (
    SCHEMA_VERSION,
    ErrorInfo,
    GenerationRequest,
    RequestClass,
    SamplingParams,
    StreamEvent,
    TemplateInputs,
    Timings,
    TokenLogprob,
    Usage,
    decode_event,
    decode_request,
)
from shared.model_cards import ModelCard, decode_card
from shared.queue import keys

CHAT = [{"role": "user", "content": "ä😀\n"}]
REQUEST = GenerationRequest("id", "m", "base", SamplingParams(seed=2**63 - 1), CHAT)


FINITE = st.floats(allow_nan=False, allow_infinity=False)
st.register_type_strategy(TokenLogprob, st.builds(TokenLogprob, logprob=FINITE))
st.register_type_strategy(
    Timings, st.builds(Timings, FINITE, FINITE, st.none() | FINITE, st.none() | FINITE, st.none() | FINITE)
)


@given(st.from_type(StreamEvent))
def test_an_event_reads_back_as_it_was_written(event: StreamEvent) -> None:
    assert decode_event(event.encode()) == event


@pytest.mark.parametrize(
    "written",
    [
        REQUEST,
        msgspec.structs.replace(REQUEST, messages=[], prompts=("ä\n", (1, 2, 3)), n=2),
        msgspec.structs.replace(REQUEST, sampling=SamplingParams(logit_bias={7: -1.5}, presence_penalty=2)),
        msgspec.structs.replace(
            REQUEST,
            template_inputs=TemplateInputs([{"maximum": 10**30}], {"a": 2**63, "b": None, "c": 1.5}, True),
        ),
        msgspec.structs.replace(
            REQUEST, tenant="t", request_class=RequestClass.BATCH, priority=-7, wait_limit_s=1.5
        ),
    ],
)
def test_a_request_reads_back_as_it_was_written(written: GenerationRequest) -> None:
    assert decode_request(written.encode()) == written


def test_a_request_without_template_inputs_is_written_as_earlier_releases_wrote_it() -> None:
    assert b"template_inputs" not in REQUEST.encode()
    assert b"template_inputs" not in decode_request(REQUEST.encode()).encode()


def test_a_card_reads_back_as_it_was_written() -> None:
    card = ModelCard("a", "base", "path", "v", 1, 512, "a")
    assert decode_card(card.encode()) == card


@pytest.mark.parametrize("message", [REQUEST, StreamEvent(event_no=0, text="a\nb\u2028c")])
def test_an_encoded_message_has_no_line_break(message: StreamEvent | GenerationRequest) -> None:
    assert b"\n" not in message.encode()


def test_fields_of_a_newer_version_are_ignored() -> None:
    newer = msgspec.json.decode(REQUEST.encode()) | {"flux": 1}
    assert decode_request(msgspec.json.encode(newer)) == REQUEST


@pytest.mark.parametrize(
    "field",
    [
        {"n": 0},
        {"n": 129},
        {"prompts": [[-1]]},
        {"prompts": [2**31]},
        {"prompts": ["x"] * 2049},
        {"priority": 2**31},
        {"wait_limit_s": 0},
        {"request_class": "urgent"},
        {"tenant": "x" * 129},
        {"sampling": {"logprobs": -1}},
        {"sampling": {"logprobs": 21}},
    ],
)
def test_a_request_out_of_range_is_refused(field: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        decode_request(msgspec.json.encode(msgspec.json.decode(REQUEST.encode()) | field))


@pytest.mark.parametrize(
    ("prompt", "num_sequences", "schema_version"),
    [
        ({"messages": CHAT}, 1, 1),
        ({"messages": CHAT, "n": 3}, 3, 2),
        ({"prompts": ("text",)}, 1, 2),
        ({"messages": CHAT, "sampling": SamplingParams(logit_bias={7: 1.5})}, 1, 2),
        ({"messages": CHAT, "sampling": SamplingParams(presence_penalty=0.5)}, 1, 2),
        ({"prompts": ("text", (1, 2)), "n": 3}, 6, 2),
        ({"messages": CHAT, "template_inputs": TemplateInputs(tools=[{"type": "function"}])}, 1, 3),
        ({"messages": CHAT, "template_inputs": TemplateInputs(variables={"enable_thinking": False})}, 1, 3),
        ({"messages": CHAT, "template_inputs": TemplateInputs(continue_final_message=True)}, 1, 3),
        ({"messages": CHAT, "template_inputs": TemplateInputs(variables={"reasoning_effort": "low"})}, 1, 1),
        ({"messages": CHAT, "cache_salt": "of one tenant"}, 1, 3),
        ({"messages": CHAT, "sampling": SamplingParams(grammar="{}")}, 1, 4),
        ({"messages": CHAT, "sampling": SamplingParams(logprobs=0)}, 1, 4),
        ({"messages": CHAT, "sampling": SamplingParams(min_p=0.1)}, 1, 4),
        ({"messages": CHAT, "sampling": SamplingParams(stop_token_ids=(7,))}, 1, 4),
        ({"messages": CHAT, "sampling": SamplingParams(includes_stop=True)}, 1, 4),
        ({"messages": CHAT, "sampling": SamplingParams(repetition_penalty=1.1)}, 1, 4),
        ({"messages": CHAT, "sampling": SamplingParams(allowed_token_ids=(5,))}, 1, 4),
    ],
)
def test_a_request_that_earlier_workers_cant_serve_is_of_the_newer_schema(
    prompt: dict[str, Any], num_sequences: int, schema_version: int
) -> None:
    request = msgspec.structs.replace(GenerationRequest("id", "m", "base", SamplingParams()), **prompt)
    assert (request.num_sequences, request.schema_version) == (num_sequences, schema_version)
    assert schema_version <= SCHEMA_VERSION


@pytest.mark.parametrize(
    ("event", "is_terminal"),
    [
        (StreamEvent(event_no=0, text="x"), False),
        (StreamEvent(event_no=0, usage=Usage(1, 1)), True),
        (StreamEvent(event_no=0, error=ErrorInfo("c", "m")), True),
    ],
)
def test_usage_or_an_error_makes_an_event_terminal(event: StreamEvent, is_terminal: bool) -> None:
    assert event.is_terminal is is_terminal


def test_every_error_survives_its_way_through_an_event() -> None:
    for code, cls in ERRORS_BY_CODE.items():
        error = from_info(cls("why", param="p").to_info())
        assert (type(error), error.code, error.message, error.param) == (cls, code, "why", "p")


def test_every_error_has_a_code_of_its_own_and_stands_in_the_drawn_tree() -> None:
    drawn = set(re.findall(r"\w+", errors.__doc__ or ""))
    classes = {
        cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, LorelayError)
    }
    assert len(classes) == len(ERRORS_BY_CODE)
    assert {cls.__name__ for cls in classes} <= drawn


def test_an_unknown_code_becomes_an_internal_error_with_its_message() -> None:
    error = from_info(ErrorInfo("of_the_future", "why"))
    assert (type(error), error.message) == (LorelayError, "why")


def test_an_error_without_a_message_says_what_its_class_says() -> None:
    assert str(errors.QueueFull()) == "The queue is full; try again later."


@pytest.mark.parametrize(
    "key", ["waiting", "doorbell", "leases", "workers", "owner", "reader", "log", "reaped"]
)
def test_the_scripts_name_keys_as_the_code_does(key: str) -> None:
    folder = resources.files("shared.queue") / "lua"
    scripts = "".join(entry.read_text() for entry in folder.iterdir() if entry.name.endswith(".lua")).replace(
        "OURS .. '", f"'{keys.PREFIX}"
    )
    assert f"'{getattr(keys, key)('')}'" in scripts
