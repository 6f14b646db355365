"""Request bodies: the values that are allowed, the refusals and their names, the sampling parameters."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from api.contract.chat_request import ChatCompletionRequest, UsualChatRequest
from api.contract.steps import run_at_once
from api.contract.strict import parse, parsed
from shared.errors import InvalidRequest, UnsupportedParameter

HELLO: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def parse_fields(**fields: Any) -> ChatCompletionRequest:
    return parse(ChatCompletionRequest, json.dumps({**HELLO, **fields}).encode())


def refusal(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse_fields(**fields)
    return caught.value


def message(**fields: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "hi", **fields}]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"model": ""}, "model"),
    ({"model": None}, "model"),
    ({"messages": "hi"}, "messages"),
    ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": message(role="robot")}, "messages[0].role"),
    ({"messages": message(content=5)}, "messages[0].content"),
    ({"messages": message(content=None)}, "messages[0].content"),
    ({"messages": message(content=[{"type": "text"}])}, "messages[0].content[0].text"),
    ({"messages": message(content=["a"])}, "messages[0].content[0]"),
    ({"messages": message(content=[{"type": "smell", "text": "a"}])}, "messages[0].content[0].type"),
    ({"messages": [*message(), *message(colour="blue")]}, "messages[1].colour"),
    ({"messages": message(role="tool")}, "messages[0].tool_call_id"),
    ({"messages": message(role="function")}, "messages[0].name"),
    ({"messages": message(role="tool", content=None, tool_call_id="1")}, "messages[0].content"),
    ({"messages": message(reasoning_content="why")}, "messages[0].reasoning_content"),
    ({"messages": message(role="assistant", reasoning_content=["why"])}, "messages[0].reasoning_content"),
    (
        {
            "messages": message(
                tool_calls=[{"id": "1", "type": "function", "function": {"name": "f", "arguments": ""}}]
            )
        },
        "messages[0].tool_calls",
    ),
    ({"messages": message(function_call={"name": "f", "arguments": ""})}, "messages[0].function_call"),
    (
        {
            "messages": message(
                role="assistant", tool_calls=[{"id": "1", "type": "function", "function": {"name": "f"}}]
            )
        },
        "messages[0].tool_calls[0].function.arguments",
    ),
    ({"temperature": True}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.01}, "temperature"),
    ({"temperature": float("nan")}, ""),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"cache_salt": 7}, "cache_salt"),
    ({"cache_salt": "x" * 513}, "cache_salt"),
    ({"top_k": 1.5}, "top_k"),
    ({"top_k": True}, "top_k"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 2**63}, "max_tokens"),
    ({"max_completion_tokens": "1"}, "max_completion_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 4, "max_tokens": 3}, "min_tokens"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"stop": ""}, "stop"),
    ({"stop": [None]}, "stop[0]"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"stop": ["a", ""]}, "stop[1]"),
    ({"stop": 5}, "stop"),
    ({"seed": 2**63}, "seed"),
    ({"seed": -(2**63) - 1}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"stream": "true"}, "stream"),
    ({"max_tokens": -2}, "max_tokens"),
    ({"stream": False, "stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"stream": True, "stream_options": {"colour": 1}}, "stream_options.colour"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"metadata": {"a": "x" * 513}}, "metadata.a"),
    ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
    ({"safety_identifier": "x" * 65}, "safety_identifier"),
    ({"service_tier": "gold"}, "service_tier"),
    ({"n": 0}, "n"),
    ({"n": "1"}, "n"),
    ({"n": 129}, "n"),
    ({"min_p": 1.1}, "min_p"),
    ({"stop_token_ids": [1, 2**31]}, "stop_token_ids[1]"),
    ({"include_stop_str_in_output": 1}, "include_stop_str_in_output"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repeat_penalty": 101}, "repeat_penalty"),
    ({"allowed_token_ids": [1, -1]}, "allowed_token_ids[1]"),
    ({"allowed_token_ids": [0] * 1_001}, "allowed_token_ids"),
    ({"min_new_tokens": 4, "max_tokens": 3}, "min_new_tokens"),
    ({"logprobs": 5}, "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    ({"top_logprobs": 1}, "top_logprobs"),
    ({"logprobs": False, "top_logprobs": 1}, "top_logprobs"),
    ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"frequency_penalty": -2.1}, "frequency_penalty"),
    ({"logit_bias": {"7": 101}}, "logit_bias.7"),
    ({"logit_bias": {"7": None}}, "logit_bias.7"),
    ({"logit_bias": {"seven": 1}}, "logit_bias.seven"),
    ({"logit_bias": {"07": 1}}, "logit_bias.07"),
    ({"logit_bias": {"-1": 1}}, "logit_bias.-1"),
    ({"logit_bias": {"2147483648": 1}}, "logit_bias.2147483648"),
    ({"logit_bias": {str(token_id): 1 for token_id in range(1_001)}}, "logit_bias"),
    ({"logit_bias": [7]}, "logit_bias"),
    ({"tool_choice": 5}, "tool_choice"),
    ({"colour": 1}, "colour"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=str)
def test_a_wrong_field_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    error = refusal(**fields)
    assert (type(error), error.param or "") == (InvalidRequest, param)
    assert param in error.message


@pytest.mark.parametrize("field", ["model", "messages"])
def test_a_required_field_that_is_missing_is_named(field: str) -> None:
    body = {name: value for name, value in HELLO.items() if name != field}
    with pytest.raises(InvalidRequest, match=f"Missing required parameter: '{field}'") as caught:
        parse(ChatCompletionRequest, json.dumps(body).encode())
    assert caught.value.param == field


def test_a_name_without_end_is_not_repeated_in_full() -> None:
    assert len(refusal(**{"x" * 10_000: 1}).message) < 200


NOT_SERVED: dict[str, tuple[list[Any], list[Any]]] = {
    # field: (neutral values, values that are refused)
    "modalities": ([["text"]], [["text", "audio"]]),
    "audio": ([], [{"voice": "x"}]),
    "prediction": ([], [{"type": "content"}]),
    "web_search_options": ([], [{}]),
    "moderation": ([], [{}]),
    "store": ([False], [True]),
    "service_tier": (["auto", "default"], ["flex", "priority"]),
    "skip_special_tokens": ([True], [False]),
    "add_generation_prompt": ([True], [False]),
    "session_id": ([-1], [7]),
}


@pytest.mark.parametrize("field", NOT_SERVED)
def test_a_known_field_that_is_not_served_passes_at_its_neutral_values_only(field: str) -> None:
    neutral, refused = NOT_SERVED[field]
    for value in [None, *neutral]:
        parse_fields(**{field: value})
    for value in refused:
        error = refusal(**{field: value})
        assert (type(error), error.param) == (UnsupportedParameter, field)
        assert error.message.endswith(f"only {_either(neutral)} is served here.")


def _either(neutral: list[Any]) -> str:
    """The values as JSON, each once: 0.0 is another spelling of 0."""
    distinct = [value for place, value in enumerate(neutral) if value not in neutral[:place]]
    return " or ".join(map(json.dumps, distinct or [None]))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (
            {"messages": message(content=[{"type": "image_url", "image_url": {}}])},
            "messages[0].content[0].type",
        ),
        ({"messages": message(role="assistant", refusal="no")}, "messages[0].refusal"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
        ),
    ],
)
def test_parts_of_a_field_that_are_not_served_are_named_too(fields: dict[str, Any], param: str) -> None:
    error = refusal(**fields)
    assert (type(error), error.param) == (UnsupportedParameter, param)


def test_labels_without_effect_are_accepted_with_any_valid_value() -> None:
    parse_fields(user="u", metadata={"a": "b"}, safety_identifier="s", prompt_cache_key="k")


def test_null_means_the_default_in_every_optional_field() -> None:
    optional = set(ChatCompletionRequest.model_fields) - {"model", "messages"}
    assert parse_fields(**dict.fromkeys(optional)) == parse_fields()


def test_defaults_are_openais() -> None:
    body = parse_fields()
    sampling = body.to_sampling()
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)
    assert (sampling.max_tokens, sampling.min_tokens, sampling.stop) == (None, 0, ())
    assert (sampling.ignore_eos, body.include_usage, bool(body.stream)) == (False, False, False)


def test_zero_top_p_means_the_single_best_token() -> None:
    sampling = parse_fields(top_p=0, top_k=50).to_sampling()
    assert (sampling.top_p, sampling.top_k) == (1.0, 1)


def test_top_k_minus_one_means_all() -> None:
    assert parse_fields(top_k=-1).to_sampling().top_k == 0


def test_a_single_stop_string_is_a_list_of_one() -> None:
    assert parse_fields(stop="END").to_sampling().stop == ("END",)


@pytest.mark.parametrize(("given", "kept"), [(7, 7), (-1, 2**63 - 1), (-(2**63), 0), (2**63 - 1, 2**63 - 1)])
def test_a_seed_is_kept_in_63_bits(given: int, kept: int) -> None:
    assert parse_fields(seed=given).to_sampling().seed == kept


def test_max_completion_tokens_wins_over_max_tokens() -> None:
    assert parse_fields(max_tokens=1, max_completion_tokens=2).to_sampling().max_tokens == 2
    assert parse_fields(max_tokens=1).to_sampling().max_tokens == 1
    with pytest.raises(InvalidRequest):
        parse_fields(max_tokens=9, max_completion_tokens=2, min_tokens=3)


def test_a_conversation_with_tools_and_an_answer_of_ours_can_be_sent_back() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    body = parse_fields(
        messages=[
            {
                "role": "developer",
                "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "kind"}],
            },
            {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call], "annotations": []},
            {"role": "tool", "content": "4", "tool_call_id": "1"},
            {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
            {"role": "function", "content": "4", "name": "f"},
            {"role": "user", "content": "", "name": "ann"},
        ]
    )
    assert [message.to_template() for message in body.messages] == [
        {"role": "developer", "content": "be kind"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "4", "tool_call_id": "1"},
        {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "content": "4", "name": "f"},
        {"role": "user", "content": "", "name": "ann"},
    ]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [0] * 10_000}, "messages[0]"),
        ({"messages": message() * 10_001}, "messages"),
        ({"messages": message(content=[0] * 1_001)}, "messages[0].content"),
        ({"tools": [0] * 1_001, "tool_choice": "none"}, "tools"),
        ({"stop": [0] * 1_001}, "stop"),
    ],
)
def test_a_long_list_is_refused_without_an_error_for_each_item(fields: dict[str, Any], param: str) -> None:
    assert refusal(**fields).param == param
    with pytest.raises(ValidationError) as caught:
        ChatCompletionRequest.model_validate({**HELLO, **fields})
    assert caught.value.error_count() < 10


def test_a_body_is_parsed_alike_with_and_without_fields_of_other_servers() -> None:
    models = (UsualChatRequest, ChatCompletionRequest)
    usual = json.dumps({**HELLO, "seed": 5, "max_tokens": 7, "stop": "x", "user": "u", "n": 1})
    foreign = usual.replace("{", '{"best_of": 1, ', 1)
    small, large = (run_at_once(parsed(models, text.encode())) for text in (usual, foreign))
    assert (type(small), type(large)) == models
    assert small.to_sampling() == large.to_sampling()
    assert small.model_dump().items() <= large.model_dump().items()
