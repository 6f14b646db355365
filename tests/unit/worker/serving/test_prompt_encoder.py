"""Prompts that are encoded beside the engine."""

import queue
from typing import Any

import msgspec
import pytest

from shared.errors import GenerationFailed, InvalidRequest
from shared.messages import GenerationRequest, TemplateInputs
from shared.queue.records import Claim, Held
from tests.streams import make_request
from worker.serving.commands import Arrival, Commands
from worker.serving.prompt_encoder import LONG_PROMPT_CHARS, Encoding, PromptEncoder


class Bench:
    """An encoder, its inbox, and what it encoded."""

    def __init__(self, *texts: str) -> None:
        self.claims = [claim_of(text) for text in texts]
        self.held = {claim.held for claim in self.claims}
        self.inbox: queue.SimpleQueue[Commands] = queue.SimpleQueue()
        self.encoded: list[str] = []
        self.encoder = PromptEncoder(self.encode, self.inbox, self.held)
        self.encoder.take(self.claims)

    def encode(self, request: GenerationRequest) -> list[list[int]]:
        (message,) = request.messages
        self.encoded.append(message["content"])
        if message["content"] == "stop":
            self.encoder.stop()
        if message["content"] == "bad":
            raise InvalidRequest("no")
        if message["content"] == "unforeseen":
            raise ZeroDivisionError
        return [[len(message["content"])]]

    def arrivals(self) -> list[Arrival]:
        """The commands that came into the inbox."""
        return [arrival for _ in range(self.inbox.qsize()) for arrival in self.inbox.get().add]


def claim_of(text: str) -> Claim:
    request = make_request(messages=[{"role": "user", "content": text}])
    return Claim(Held(request.request_id, "x"), request, ())


def test_prompts_arrive_with_their_tokens_or_with_the_reason_why_there_are_none() -> None:
    bench = Bench("four", "bad", "stop")
    bench.encoder.run_short()
    good, bad, _ = bench.arrivals()
    assert good[:2] == (bench.claims[0], [[4]])
    assert (bad.claim, type(bad.prompts)) == (bench.claims[1], InvalidRequest)


def test_an_unforeseen_error_ends_its_own_request_only_and_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bench = Bench("unforeseen", "four", "stop")
    bench.encoder.run_short()
    bad, good, _ = bench.arrivals()
    assert (bad.claim, type(bad.prompts)) == (bench.claims[0], GenerationFailed)
    assert good.prompts == [[4]]
    (record,) = caplog.records
    assert (record.request_id, record.exc_info[0]) == (bench.claims[0].held.request_id, ZeroDivisionError)


def test_a_claim_that_is_not_held_any_more_is_not_encoded() -> None:
    bench = Bench("one", "two", "stop")
    bench.held.remove(bench.claims[0].held)
    bench.encoder.run_short()
    assert bench.encoded == ["two", "stop"]


def test_a_stop_leaves_what_waits() -> None:
    bench = Bench("stop", "two")
    bench.encoder.run_short()
    assert bench.encoded == ["stop"]


def test_long_prompts_have_a_lane_of_their_own() -> None:
    long = "x" * (LONG_PROMPT_CHARS + 1)
    bench = Bench(long, "stop")
    bench.encoder.run_short()
    assert bench.encoded == ["stop"]


LONG = "x" * (LONG_PROMPT_CHARS + 1)


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "assistant", "content": "", "reasoning_content": LONG}]},
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"arguments": LONG}]}]},
        {"template_inputs": TemplateInputs([{"function": {"description": LONG}}])},
    ],
)
def test_all_that_the_template_writes_counts_towards_the_length_of_a_prompt(fields: dict[str, Any]) -> None:
    bench = Bench("stop")
    bench.encoder.take([Claim(Held("long", "x"), msgspec.structs.replace(make_request(), **fields), ())])
    bench.encoder.run_short()
    assert bench.encoded == ["stop"]


class Clock:
    """A clock that the test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_request_that_is_being_encoded_is_named_with_its_model_and_its_age() -> None:
    clock, found = Clock(), list[Encoding | None]()
    claim = claim_of("slow")

    def encode(request: GenerationRequest) -> list[list[int]]:
        clock.now += 61
        found.append(encoder.longest())
        encoder.stop()
        return [[1]]

    encoder = PromptEncoder(encode, queue.SimpleQueue(), {claim.held}, clock)
    encoder.take([claim])
    assert encoder.longest() is None
    encoder.run_short()
    assert found == [Encoding(claim.held, claim.request.model, 61)]
    assert encoder.longest() is None


def test_long_prompts_are_counted_until_they_are_encoded_or_not_held_any_more() -> None:
    long = "x" * (LONG_PROMPT_CHARS + 1)
    bench = Bench("short", long, long + "y", long + "z", long + "!")
    assert bench.encoder.num_long == 4
    bench.held.remove(bench.claims[2].held)
    seen: list[int] = []
    encode = bench.encode

    def encode_and_count(request: GenerationRequest) -> list[list[int]]:
        seen.append(bench.encoder.num_long)
        if len(seen) == 3:
            bench.encoder.stop()
        return encode(request)

    bench.encoder._encode = encode_and_count
    bench.encoder.run_long()
    assert (seen, bench.encoder.num_long) == ([4, 2, 1], 0)
