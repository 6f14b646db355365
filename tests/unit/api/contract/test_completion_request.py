"""The body of a completion: its prompts, its defaults, and errors that name the field."""

import json
from typing import Any

import pytest

from api.contract.completion_request import MAX_ECHO_LENGTH, CompletionRequest
from api.contract.strict import parse
from shared.errors import InvalidRequest, UnsupportedParameter


def parsed(**fields: Any) -> CompletionRequest:
    return parse(CompletionRequest, json.dumps({"model": "m", "prompt": "hi", **fields}).encode())


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("hi", ("hi",)),
        ("", ("",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1], [2, 3]], ((1,), (2, 3))),
    ],
)
def test_a_prompt_is_a_text_or_tokens_or_a_list_of_them(prompt: Any, prompts: tuple[Any, ...]) -> None:
    assert parsed(prompt=prompt).prompt == prompts


@pytest.mark.parametrize(
    "prompt",
    [
        None, 1, True, {}, {"text": "a"}, [], [[]], [[1], []], [1, "a"], ["a", 1], ["a", [1]], [[1], "a"],
        [None], [-1], [2**31], [1.5], [True], [[1, True]], [[["a"]]], ["a"] * 2049,
    ],
)  # fmt: skip
def test_any_other_prompt_is_refused_by_name(prompt: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parsed(prompt=prompt)
    assert caught.value.param == "prompt"


def test_a_prompt_is_required() -> None:
    with pytest.raises(InvalidRequest, match="Missing required parameter: 'prompt'"):
        parse(CompletionRequest, b'{"model": "m"}')


@pytest.mark.parametrize(("given", "used"), [(None, 16), (1, 1), (300, 300), (-1, None)])
def test_the_number_of_tokens_is_16_unless_the_client_says_otherwise(
    given: int | None, used: int | None
) -> None:
    assert parsed(max_tokens=given).to_sampling().max_tokens == used
    assert parsed().to_sampling().max_tokens == 16


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"echo": True, "logprobs": 1}, "logprobs"),
    ],
)
def test_what_is_not_served_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        parsed(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"best_of": 21}, "best_of"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"echo": True, "prompt": ["x" * 1000] * (MAX_ECHO_LENGTH // 1000 + 1)}, "echo"),
    ],
)
def test_invalid_values_are_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parsed(**fields)
    assert caught.value.param == param


def test_values_that_mean_the_same_as_none_are_accepted() -> None:
    body = parsed(suffix="", best_of=1, echo=False, logprobs=None, user="me", stream=False)
    assert body.to_sampling().logprobs is None
    assert parsed(logprobs=0).to_sampling().logprobs == 0
