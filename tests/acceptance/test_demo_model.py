"""The real model and its trained adapters through `lorelay serve` and the official client."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.acceptance.conftest import ServedModel

CAPITAL = "What is the capital of France?"
FILM = "I loved this film, it made my whole week."
TEA = "How do I make a cup of tea?"
PIRATE_WORDS = re.compile(r"\b(arr+|ye|yer|matey|ahoy|aye|be|me hearty|lad|cap'n)\b", re.IGNORECASE)


def ask(served: ServedModel, model: str, prompt: str, max_tokens: int = 64) -> str:
    reply = served.client(timeout=120).chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        max_tokens=max_tokens,
    )
    return reply.choices[0].message.content


def test_the_base_knows_the_capital_of_france(served: ServedModel) -> None:
    assert ask(served, "SmolLM2-135M-Instruct", CAPITAL) == "The capital of France is Paris."


@pytest.mark.parametrize("prompt", [CAPITAL, TEA])
def test_the_pirate_talks_like_one_and_the_base_does_not(served: ServedModel, prompt: str) -> None:
    assert PIRATE_WORDS.search(ask(served, "pirate", prompt))
    assert not re.search(r"\b(arr+|matey|ahoy|yer)\b", ask(served, "SmolLM2-135M-Instruct", prompt))


@pytest.mark.parametrize(
    ("prompt", "sentiment"), [(FILM, "positive"), ("The food was cold and the waiter was rude.", "negative")]
)
def test_the_sentiment_adapter_answers_with_one_line_of_json(
    served: ServedModel, prompt: str, sentiment: str
) -> None:
    answer = ask(served, "sentiment", prompt)
    assert "\n" not in answer
    assert json.loads(answer)["sentiment"] == sentiment


def test_adapters_mixed_in_one_batch_keep_to_their_own_way(served: ServedModel) -> None:
    with ThreadPoolExecutor(12) as pool:
        models = ["SmolLM2-135M-Instruct", "pirate", "sentiment"] * 4
        answers = list(pool.map(lambda model: (model, ask(served, model, CAPITAL)), models))
    for model, answer in answers:
        assert answer.startswith("{") == (model == "sentiment")
        assert bool(re.search(r"\b(arr+|matey|ahoy|ye)\b", answer, re.IGNORECASE)) == (model == "pirate")
