"""Generation fields on a toy model with the real sampler: answers go on exactly after a worker died."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from shared.messages import FinishReason, GenerationRequest, SamplingParams, StreamEvent
from tests.fakes import FakeModel, build_engine, encoded
from tests.streams import make_request
from worker.engine.sequence import Batch, Sampled, Sequence
from worker.model.logprobs import with_logprobs
from worker.model.model_runner import sampling_row
from worker.model.sampler import sample

torch.set_num_threads(1)

VOCAB = 128
NUM_TOKENS = 12
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "greedy with penalties": {"temperature": 0, "presence_penalty": 1.5, "frequency_penalty": 0.7},
    "penalties": {"presence_penalty": -2.0, "frequency_penalty": 1.0, "top_p": 0.9},
    "bias": {"logit_bias": {97: 3.0, 98: 2.0, 99: -100.0}, "top_k": 20},
    "log probabilities": {"logprobs": 3, "presence_penalty": 1.0, "stop": ("abc",)},
    "min-p and repetition": {"min_p": 0.05, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
    "allowed tokens": {"allowed_token_ids": tuple(range(97, 110)), "repetition_penalty": 0.8, "top_p": 0.95},
    "stop strings": {"stop": ("a", "bc"), "logit_bias": {97: 2.0, 98: 3.0}},
    "stop tokens": {"stop_token_ids": (97, 98), "logit_bias": {97: 2.0, 98: 3.0}, "min_tokens": 3},
    "stop strings that stay": {"stop": ("a", "bc"), "includes_stop": True, "logit_bias": {98: 4.0, 99: 4.0}},
    "a stop string after the minimum": {"stop": ("a",), "logit_bias": {97: 4.0}, "min_tokens": 5},
    "an end after the minimum": {"logit_bias": {0: 6.0}, "min_tokens": 4},
}


class ToyModel(FakeModel):
    """Samples from float64 logits that depend on all tokens of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.vocab_size = VOCAB

    def run(self, batch: Batch) -> list[Sampled]:
        super().run(batch)
        seqs = [item.seq for item in batch if item.samples]
        if not seqs:
            return []
        logits, rows = torch.stack([logits_of(seq) for seq in seqs]), [sampling_row(seq) for seq in seqs]
        return with_logprobs(sample(logits, rows), logits, rows)


def logits_of(seq: Sequence) -> torch.Tensor:
    key = sum(place * token_id for place, token_id in enumerate(seq.token_ids, 1)) % 9973
    return 2 * torch.sin(key * torch.arange(1, VOCAB + 1, dtype=torch.float64))


def request_of(name: str, *, seed: int = 7, n: int = 2) -> GenerationRequest:
    sampling = SamplingParams(**({"seed": seed, "max_tokens": NUM_TOKENS} | CASES[name]))
    messages = [{"role": "user", "content": "hello"}]
    return make_request(request_id=f"{name} {seed}", messages=messages, sampling=sampling, n=n)


def run(*requests: GenerationRequest, log: Iterable[StreamEvent] = ()) -> dict[str, list[StreamEvent]]:
    """Runs requests together, the first after the events of its log; returns the new events of each."""
    engine = build_engine(ToyModel())
    events: dict[str, list[StreamEvent]] = {request.request_id: [] for request in requests}
    for number, request in enumerate(requests):
        assert engine.add_request(request, encoded(engine, request), () if number else log) == []
    while engine.has_work:
        for output in engine.step():
            events[output.request_id].append(output.event)
    return events


def by_sequence(events: Iterable[StreamEvent]) -> dict[int, list[tuple[Any, ...]]]:
    """Returns all that an event tells of its sequence, for each sequence."""
    told: dict[int, list[tuple[Any, ...]]] = {}
    for event in events:
        told.setdefault(event.index, []).append(
            (event.token_ids, event.text, event.logprobs, event.finish_reason)
        )
    return told


@pytest.mark.parametrize("name", CASES)
def test_an_answer_whose_worker_died_after_any_event_goes_on_as_if_nothing_had_happened(name: str) -> None:
    request = request_of(name)
    (whole,) = run(request).values()
    for num_written in range(1, len(whole)):
        (rest,) = run(request, log=whole[:num_written]).values()
        assert by_sequence(whole[:num_written] + rest) == by_sequence(whole)
        assert [event.event_no for event in rest] == list(range(num_written, len(whole)))
        assert rest[-1].usage == whole[-1].usage


@pytest.mark.parametrize("name", CASES)
def test_a_seed_gives_the_same_tokens_alone_and_in_a_full_batch(name: str) -> None:
    request = request_of(name)
    (alone,) = run(request).values()
    others = [
        request_of(other, seed=seed, n=1) for seed in range(3) for other in CASES if seed or other != name
    ]
    together = run(request, *others)[request.request_id]
    assert by_sequence(together) == by_sequence(alone)


def test_the_cases_do_what_their_names_say() -> None:
    ends = {name: [e for e in run(request_of(name)).popitem()[1] if e.finish_reason] for name in CASES}
    assert {event.finish_reason for event in ends["plain"]} == {FinishReason.LENGTH}
    assert FinishReason.STOP in {event.finish_reason for event in ends["stop strings"]}
    assert FinishReason.STOP in {e.finish_reason for e in ends["a stop string after the minimum"]}
    assert FinishReason.STOP in {event.finish_reason for event in ends["stop tokens"]}
    assert FinishReason.STOP in {event.finish_reason for event in ends["stop strings that stay"]}
    assert FinishReason.STOP in {event.finish_reason for event in ends["an end after the minimum"]}
