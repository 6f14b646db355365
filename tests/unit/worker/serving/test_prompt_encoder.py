"""Prompts that are encoded beside the engine."""

from typing import Any

from shared.errors import InvalidRequest
from shared.queue.records import Claim, Held
from tests.streams import make_request
from worker.serving.prompt_encoder import Prompt, PromptEncoder


def claim_of(text: str) -> Claim:
    request = make_request(messages=[{"role": "user", "content": text}])
    return Claim(Held(request.request_id, "x"), request, ())


def encode(messages: list[dict[str, Any]]) -> list[int]:
    if messages[0]["content"] == "bad":
        raise InvalidRequest("no")
    return [len(messages[0]["content"])]


def test_prompts_are_delivered_with_their_tokens_or_with_the_reason_why_there_are_none() -> None:
    delivered: list[tuple[str, Prompt]] = []
    encoder = PromptEncoder(encode, lambda claim, prompt: delivered.append((claim.held.request_id, prompt)))
    claims = [claim_of("four"), claim_of("bad")]
    encoder.take(claims)
    encoder._short.put(None)
    encoder.run_short()
    assert [request_id for request_id, _ in delivered] == [claim.held.request_id for claim in claims]
    assert delivered[0][1] == [4]
    assert isinstance(delivered[1][1], InvalidRequest)


def test_a_claim_that_is_not_wanted_any_more_is_not_encoded() -> None:
    encoded: list[str] = []
    claims = [claim_of("one"), claim_of("two")]
    encoder = PromptEncoder(
        lambda messages: encoded.append(messages[0]["content"]) or [],
        lambda claim, prompt: None,
        lambda claim: claim is claims[1],
    )
    encoder.take(claims)
    encoder._short.put(None)
    encoder.run_short()
    assert encoded == ["two"]


def test_a_stop_leaves_what_waits() -> None:
    encoded: list[str] = []
    encoder = PromptEncoder(lambda messages: encoded.append("x") or [], lambda claim, prompt: encoder.stop())
    encoder.take([claim_of("one"), claim_of("two")])
    encoder.run_short()
    assert encoded == ["x"]
