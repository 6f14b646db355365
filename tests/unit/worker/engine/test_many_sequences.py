"""Requests of several prompts and several choices: their events, their end, and what they compute."""

import sys

import pytest

from shared.errors import from_info
from shared.messages import FinishReason, GenerationRequest, SamplingParams, StreamEvent, Usage
from tests.block_checks import check_blocks
from tests.fakes import EOS, FakeModel, build_engine, encoded
from tests.streams import make_request
from worker.engine.block_manager import BlockManager
from worker.engine.records import Output
from worker.engine.sequence import Batch, OutOfDeviceMemory, Sampled, Sequence

PROMPTS = ("a first prompt of 28 letters", tuple(b"a second one, given as token ids"), "the last")
"""Prompts of 28, 32 and 8 tokens, with different remainders after their last full blocks."""
BLOCK_SIZE = 4


def choices(seq: Sequence) -> int:
    """A letter that depends on the index and on all tokens so far; every fifth sequence ends early."""
    if seq.index % 5 == 1 and seq.num_output_tokens == 3:
        return EOS
    return ord("a") + (sum(i * t for i, t in enumerate(seq.token_ids, 1)) + seq.index) % 26


class Bench:
    """An engine on a fake model."""

    def __init__(self, model: FakeModel | None = None, num_blocks: int = 128, **options: int) -> None:
        self.model = model or FakeModel(choices, block_size=BLOCK_SIZE)
        self.blocks = BlockManager(num_blocks, BLOCK_SIZE)
        self.engine = build_engine(self.model, self.blocks, **options)

    def add(self, request: GenerationRequest, events: list[StreamEvent] | None = None) -> list[Output]:
        return self.engine.add_request(request, encoded(self.engine, request), events or [])

    def finish(self) -> list[StreamEvent]:
        """The events until nothing is left."""
        events: list[StreamEvent] = []
        for _ in range(1000):
            if not self.engine.has_work:
                return events
            outputs = self.engine.step()
            assert outputs or not self.engine.is_stalled
            events += [output.event for output in outputs]
        pytest.fail("the engine never came to an end")

    @property
    def num_computed_tokens(self) -> int:
        return sum(num_tokens for batch in self.model.batches for _, num_tokens in batch)


def request_of(**values: object) -> GenerationRequest:
    sampling = SamplingParams(temperature=0, max_tokens=6)
    defaults = {"request_id": "r", "messages": [], "prompts": PROMPTS, "n": 2, "sampling": sampling}
    return make_request(**(defaults | values))


def texts(events: list[StreamEvent]) -> dict[int, str]:
    """The text of each sequence."""
    return {
        index: "".join(event.text for event in events if event.index == index)
        for index in sorted({event.index for event in events})
    }


def ends(events: list[StreamEvent]) -> dict[int, FinishReason]:
    """The finish reason of each sequence."""
    return {event.index: event.finish_reason for event in events if event.finish_reason}


def run(request: GenerationRequest, **options: int) -> list[StreamEvent]:
    bench = Bench(**options)
    assert bench.add(request) == []
    events = bench.finish()
    check_blocks(bench.blocks)
    return events


def test_each_sequence_has_the_text_that_it_has_alone_and_the_last_end_is_that_of_the_request() -> None:
    events = run(request_of())
    assert [event.event_no for event in events] == list(range(len(events)))
    for index, text in texts(events).items():
        model = FakeModel(lambda seq, index=index: choices_of(index, seq), block_size=BLOCK_SIZE)
        bench = Bench(model)
        bench.add(request_of(prompts=PROMPTS[index // 2 : index // 2 + 1], n=1))
        assert texts(bench.finish()) == {0: text}
    assert ends(events) == {index: "stop" if index == 1 else "length" for index in range(6)}
    assert [event.is_terminal for event in events] == [False] * (len(events) - 1) + [True]
    assert events[-1].usage == Usage(prompt_tokens=28 + 32 + 8, completion_tokens=5 * 6 + 4)


def choices_of(index: int, seq: Sequence) -> int:
    """The token that a sequence would get at another index."""
    seq.index, own = index, seq.index
    token_id = choices(seq)
    seq.index = own
    return token_id


def test_events_come_as_the_sequences_go_on_side_by_side() -> None:
    first_of_each = [event.index for event in run(request_of(prompts=("ab", "cd"))) if event.event_no < 8]
    assert first_of_each == [0, 1, 2, 3, 0, 1, 2, 3]


def test_a_request_that_lost_its_worker_at_any_event_goes_on_in_all_its_sequences() -> None:
    request = request_of()
    whole = run(request)
    for num_written in range(1, len(whole)):
        bench = Bench()
        assert bench.add(request, whole[:num_written]) == []
        rest = bench.finish()
        assert [event.event_no for event in rest] == list(range(num_written, len(whole)))
        assert texts(whole[:num_written] + rest) == texts(whole)
        assert ends(whole[:num_written] + rest) == ends(whole)
        assert rest[-1].usage == whole[-1].usage
        ended = ends(whole[:num_written])
        assert not any(event.index in ended for event in rest), "what had ended stays ended"
        check_blocks(bench.blocks)


def test_each_choice_of_an_echoed_prompt_begins_with_it_once_whatever_worker_goes_on() -> None:
    request, plain = request_of(echo=True), texts(run(request_of()))
    echoed = run(request)
    prompts = (PROMPTS[0], bytes(PROMPTS[1]).decode(), PROMPTS[2])
    assert texts(echoed) == {index: prompts[index // 2] + text for index, text in plain.items()}
    for num_written in range(1, len(echoed)):
        bench = Bench()
        bench.add(request, echoed[:num_written])
        assert texts(echoed[:num_written] + bench.finish()) == texts(echoed)


@pytest.mark.parametrize("num_choices", [1, 2, 5, 12])
def test_of_a_prompt_at_most_one_block_is_computed_again_for_each_further_choice(num_choices: int) -> None:
    bench = Bench()
    bench.add(request_of(n=num_choices, sampling=SamplingParams(max_tokens=6, ignore_eos=True)))
    usage = bench.finish()[-1].usage
    # The newest token of a sequence is in no cache.
    num_decoded = usage.completion_tokens - 3 * num_choices
    again = bench.num_computed_tokens - num_decoded - usage.prompt_tokens
    assert again <= 3 * (num_choices - 1) * BLOCK_SIZE
    assert usage == Usage(68, 18 * num_choices, cached_tokens=0)


def test_prompts_are_cached_once_however_many_choices_they_have() -> None:
    bench = Bench()
    bench.add(request_of(request_id="first", n=1))
    bench.finish()
    bench.add(request_of(n=3))
    assert bench.finish()[-1].usage.cached_tokens == 24 + 28 + 4


def test_a_prompt_without_a_whole_block_keeps_no_choice_waiting() -> None:
    bench = Bench()
    bench.add(request_of(prompts=("abc",), n=4))
    bench.engine.step()
    assert bench.model.batches == [[("r", 3)] * 4]


def test_without_a_prefix_cache_no_choice_waits_for_another() -> None:
    bench = Bench()
    bench.blocks = BlockManager(128, BLOCK_SIZE, shares_prefixes=False)
    bench.engine = build_engine(bench.model, bench.blocks, max_prefill_tokens=64)
    bench.add(request_of(prompts=("eight to",), n=3))
    bench.engine.step()
    assert bench.model.batches == [[("r", 8)] * 3]


@pytest.mark.parametrize("num_blocks", [10, 13, 20])
def test_choices_that_must_give_way_to_each_other_all_end(num_blocks: int) -> None:
    expected = texts(run(request_of()))
    events = run(request_of(), num_blocks=num_blocks, max_batch_size=4, max_prefill_tokens=5)
    assert texts(events) == expected


def test_more_choices_than_a_batch_holds_run_one_after_another() -> None:
    events = run(request_of(prompts=("abc",), n=9), max_batch_size=2)
    assert len(ends(events)) == 9


def test_a_choice_that_ends_gives_its_blocks_back_at_once() -> None:
    bench = Bench(FakeModel(lambda seq: EOS if seq.index == 0 else ord("x"), block_size=BLOCK_SIZE))
    bench.add(request_of(prompts=("abc",), n=2))
    bench.engine.step()
    assert bench.engine.remains == "1 requests, 1 cache blocks in use"


@pytest.mark.parametrize("end", ["abort_request", "stop_request", "drop_request"])
@pytest.mark.parametrize("num_steps", [0, 1, 2, 5])
def test_a_request_ends_with_all_its_sequences_whether_they_run_or_wait(end: str, num_steps: int) -> None:
    bench = Bench(max_batch_size=3)
    bench.add(request_of())
    for _ in range(num_steps):
        bench.engine.step()
    getattr(bench.engine, end)("r")
    assert bench.engine.remains == "0 requests, 0 cache blocks in use"
    assert not bench.engine.has_work
    check_blocks(bench.blocks)


def test_an_abort_counts_the_tokens_of_all_sequences() -> None:
    bench = Bench()
    bench.add(request_of(prompts=("abc", "de")))
    bench.engine.step()
    (output,) = bench.engine.abort_request("r")
    assert output.event.usage == Usage(prompt_tokens=5, completion_tokens=4)
    assert output.meta["completion_tokens"] == 4


def test_logits_that_give_no_token_end_the_whole_request_once() -> None:
    bench = Bench(FakeModel(lambda seq: None if seq.index == 1 else ord("x"), block_size=BLOCK_SIZE))
    bench.add(request_of(prompts=("abc",), n=3))
    events = bench.finish()
    assert [event.index for event in events] == [0, 0]
    assert events[-1].error.code == "generation_failed"
    assert bench.engine.remains == "0 requests, 0 cache blocks in use"


@pytest.mark.parametrize(
    ("values", "param", "says"),
    [
        ({"prompts": ("abc", (1, 2**20))}, "prompt", "token id"),
        ({"prompts": ("abc", ())}, "prompt", "no tokens"),
        ({"prompts": ("",)}, "prompt", "no tokens"),
        ({"prompts": ("x" * 65,)}, "prompt", "65 tokens were given in the prompt"),
        ({"sampling": SamplingParams(logit_bias={2**20: 1.0})}, "logit_bias", "token id"),
        ({"sampling": SamplingParams(allowed_token_ids=(2**20,))}, "allowed_token_ids", "token id"),
        ({"sampling": SamplingParams(stop_token_ids=(2**20,))}, "stop_token_ids", "token id"),
    ],
)
def test_prompts_that_the_model_cant_take_are_refused_by_name(
    values: dict[str, object], param: str, says: str
) -> None:
    bench = Bench()
    ((_, event, _),) = bench.add(request_of(**values))
    assert event.error.param == param
    assert says in from_info(event.error).message
    assert bench.engine.remains == "0 requests, 0 cache blocks in use"


@pytest.mark.parametrize(
    "events",
    [
        [StreamEvent(event_no=0, index=6, token_ids=(97,), text="a")],
        [StreamEvent(event_no=0, index=-1, token_ids=(97,), text="a")],
        [StreamEvent(event_no=i, index=i, token_ids=(97,), finish_reason="stop") for i in range(6)],
        [StreamEvent(event_no=0, index=3, token_ids=(97,) * 6, text="a")],
        [StreamEvent(event_no=0, index=3, token_ids=(2**20,), text="a")],
    ],
    ids=["an index too many", "a negative index", "all ended", "too many tokens", "beyond the vocabulary"],
)
def test_a_log_that_no_worker_could_have_written_is_refused(events: list[StreamEvent]) -> None:
    bench = Bench()
    ((_, event, _),) = bench.add(request_of(), events)
    assert (event.event_no, event.error.code) == (len(events), "generation_failed")
    assert not bench.engine.has_work


def test_the_messages_of_a_request_leave_memory_while_it_runs() -> None:
    bench = Bench()
    request = request_of(prompts=(), messages=[{"role": "user", "content": "hello"}])
    before = sys.getrefcount(request), sys.getrefcount(request.messages)
    bench.add(request)
    bench.engine.step()
    assert (sys.getrefcount(request), sys.getrefcount(request.messages)) == before


def test_a_request_that_has_memory_for_two_of_its_sequences_runs_two_at_once() -> None:
    bench, run_all = Bench(), FakeModel.run

    def run(batch: Batch) -> list[Sampled]:
        if len(batch) > 2:
            raise OutOfDeviceMemory
        return run_all(bench.model, batch)

    bench.model.run = run
    bench.add(request_of(prompts=("abc",), n=5))
    events: list[StreamEvent] = []
    while bench.engine.has_work:
        try:
            events += [output.event for output in bench.engine.step()]
        except OutOfDeviceMemory:
            assert bench.engine.shed() == (None, [])
    assert len(ends(events)) == 5
    assert max(map(len, bench.model.batches)) == 2
    assert bench.engine.max_num_sequences == 2


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({}, "ab"),
        ({"includes_stop": True}, "abc"),
        ({"min_tokens": 3}, "abcab"),
        ({"ignore_eos": True}, "ab"),
    ],
    ids=str,
)
def test_a_stop_token_ends_the_answer_after_the_minimum_and_its_text_stays_only_if_asked_for(
    sampling: dict[str, object], expected: str
) -> None:
    bench = Bench(FakeModel(lambda seq: ord("abcabc"[seq.num_output_tokens]), block_size=BLOCK_SIZE))
    params = SamplingParams(max_tokens=6, stop_token_ids=(ord("c"),), **sampling)  # type: ignore[arg-type]
    bench.add(request_of(prompts=("abc",), n=1, sampling=params))
    events = bench.finish()
    assert texts(events) == {0: expected}
    assert ends(events) == {0: FinishReason.STOP}
    assert events[-1].token_ids == (ord("c"),)
