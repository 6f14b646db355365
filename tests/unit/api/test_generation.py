"""Checks of all routes before a request goes to its queue."""

from typing import Any

import pytest

from api.generation import Input, check_length, check_num_sequences
from shared.errors import ContextLengthExceeded, InvalidRequest
from shared.messages import SamplingParams, TextOrTokens
from shared.model_cards import ModelCard
from shared.settings import ApiSettings
from tests.streams import make_request

CARD = ModelCard("m", "m", "folder", "v", 1, max_model_len=100, max_token_bytes=4)


def check(*messages: dict[str, Any], card: ModelCard = CARD, **sampling: Any) -> None:
    check_length(card, Input(list(messages)), SamplingParams(**sampling))


def said(text: Any, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": text}


@pytest.mark.parametrize(
    "messages",
    [
        [said("x" * 397)],
        [said("x" * 200), said("ok", "assistant"), said("x" * 197)],
        [said("\u20ac" * 133)],
        [said([{"type": "text", "text": "x" * 200}, {"type": "text", "text": "y" * 197}])],
    ],
)
def test_a_chat_that_no_tokenizer_could_fit_into_the_context_is_refused(
    messages: list[dict[str, Any]],
) -> None:
    with pytest.raises(ContextLengthExceeded, match=r"100 tokens, but \d+ bytes .* 100 tokens or more"):
        check(*messages)


@pytest.mark.parametrize(
    "messages",
    [
        [said("x" * 396)],
        [said(" " * 9999 + "x" + "\n" * 9999)],
        [said("x" * 9999, "system"), said("x" * 9999, "assistant"), said("hi")],
        [said("\x04\x00\x7f" * 9999 + "hi")],
        [said("\U000e0100" * 9999 + "hi")],
        [said(None, "assistant"), said("hi")],
    ],
)
def test_a_chat_that_could_fit_is_never_refused(messages: list[dict[str, Any]]) -> None:
    check(*messages)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 4}, None),
        ({"n": 5}, "n"),
        ({"prompts": ("a",) * 5}, "prompt"),
        ({"prompts": ("a",) * 2, "n": 3}, "n"),
        ({"n": 2, "sampling": SamplingParams(logprobs=1)}, None),
        ({"n": 2, "sampling": SamplingParams(logprobs=2)}, "top_logprobs"),
        ({"prompts": ("a", "b"), "sampling": SamplingParams(logprobs=2)}, "logprobs"),
    ],
    ids=str,
)
def test_sequences_and_their_log_probabilities_are_limited(fields: dict[str, Any], param: str | None) -> None:
    request, settings = make_request(**fields), ApiSettings(max_sequences_per_request=4)
    if param is None:
        check_num_sequences(request, settings)
        return
    with pytest.raises(InvalidRequest) as caught:
        check_num_sequences(request, settings)
    assert caught.value.param == param


def test_the_tokens_to_generate_count_too() -> None:
    check(said("x" * 200), max_tokens=50)
    with pytest.raises(ContextLengthExceeded, match="and 51 tokens for the completion"):
        check(said("x" * 200), max_tokens=51)


def test_without_a_bound_a_worker_decides() -> None:
    check(said("x" * 9999), card=ModelCard("m", "m", "folder", "v", 1, max_model_len=100))


@pytest.mark.parametrize("prompt", ["x" * 397, (1,) * 100, "\u20ac" * 133])
def test_a_prompt_that_can_not_fit_into_the_context_is_refused(prompt: TextOrTokens) -> None:
    with pytest.raises(ContextLengthExceeded, match=r"100 tokens, but .* were given in the prompt"):
        check_length(CARD, Input(prompts=("ok", prompt)), SamplingParams())


@pytest.mark.parametrize("prompt", ["x" * 396, (1,) * 99, " " * 999 + "x"])
def test_a_prompt_that_could_fit_is_never_refused(prompt: TextOrTokens) -> None:
    check_length(CARD, Input(prompts=("ok", prompt)), SamplingParams())
