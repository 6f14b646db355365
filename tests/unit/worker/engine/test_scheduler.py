"""Continuous batching, chunked prefill and preemption, on a runner that checks every block."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import GenerationFailed
from shared.messages import SamplingParams
from tests.block_checks import check_blocks
from tests.fakes import AllResident, FakeModel, drawn, letters, unpaced
from worker.engine.block_manager import BlockManager
from worker.engine.scheduler import MIN_CHUNK_TOKENS, Scheduler
from worker.engine.sequence import Sequence, SequenceStatus
from worker.engine.step_pace import MAX_NUM_CHUNK_STEPS, StepPace

BLOCK_SIZE = 4


def make_sequence(
    request_id: str, num_prompt_tokens: int = 3, max_tokens: int = 4, adapter_name: str | None = None
) -> Sequence:
    return Sequence(
        request_id=request_id,
        index=0,
        adapter_name=adapter_name,
        sampling=SamplingParams(),
        token_ids=[(ord(request_id[-1]) * i) % 97 + 1 for i in range(1, num_prompt_tokens + 1)],
        num_prompt_tokens=num_prompt_tokens,
        max_tokens=max_tokens,
    )


class Bench:
    """A scheduler over a few blocks, stepped by hand."""

    def __init__(
        self,
        num_blocks: int = 16,
        max_batch_size: int = 4,
        max_prefill_tokens: int = 8,
        shares_prefixes: bool = True,
    ) -> None:
        self.blocks = BlockManager(num_blocks, BLOCK_SIZE, shares_prefixes=shares_prefixes)
        self.scheduler = Scheduler(
            self.blocks,
            unpaced(),
            max_batch_size=max_batch_size,
            max_prefill_tokens=max_prefill_tokens,
            adapters=AllResident(),
        )
        self.runner = FakeModel(block_size=BLOCK_SIZE)

    def step(self) -> list[tuple[str, int]]:
        """Runs one step, finishes what reached its end, and returns what was scheduled."""
        batch = self.scheduler.schedule()
        for seq, _ in self.scheduler.postprocess(batch, self.runner.run(batch)):
            if seq.num_output_tokens == seq.max_tokens:
                self.scheduler.finish(seq)
        return self.runner.batches[-1]

    def run_all(self) -> None:
        for _ in range(2000):
            if not self.scheduler.has_work:
                return
            assert self.step(), "a step with work ran nothing"
        pytest.fail("the scheduler never came to an end")


def test_it_tells_which_sequences_of_an_adapter_wait() -> None:
    bench = Bench(max_batch_size=1)
    runs, waits, next_one = [make_sequence(name, adapter_name="a") for name in "abc"]
    for seq in (runs, waits, make_sequence("d", adapter_name="b"), make_sequence("e"), next_one):
        bench.scheduler.add(seq)
    bench.step()
    assert bench.scheduler.requests_waiting_for("a") == [waits.request_id, next_one.request_id]


def test_a_sequence_joins_the_running_batch_at_any_step() -> None:
    bench = Bench()
    bench.scheduler.add(make_sequence("r1"))
    assert bench.step() == [("r1", 3)]
    bench.scheduler.add(make_sequence("r2", 5))
    assert bench.step() == [("r1", 1), ("r2", 5)]
    assert bench.step() == [("r1", 1), ("r2", 1)]


def test_a_long_prompt_is_computed_in_chunks_while_others_decode() -> None:
    bench = Bench()
    bench.scheduler.add(make_sequence("r1"))
    bench.step()
    bench.scheduler.add(make_sequence("r2", 20))
    assert [bench.step() for _ in range(3)] == [
        [("r1", 1), ("r2", 8)],
        [("r1", 1), ("r2", 8)],
        [("r1", 1), ("r2", 4)],
    ]


def test_the_batch_never_exceeds_its_size() -> None:
    bench = Bench(max_batch_size=2)
    for name in ("r1", "r2", "r3"):
        bench.scheduler.add(make_sequence(name, 2))
    assert bench.step() == [("r1", 2), ("r2", 2)]
    assert bench.step() == [("r1", 1), ("r2", 1)]


def test_the_newest_gives_way_when_blocks_run_out_and_is_computed_again() -> None:
    bench = Bench(num_blocks=3, shares_prefixes=False)
    old, new = make_sequence("r1", 4, 4), make_sequence("r2", 4, 4)
    bench.scheduler.add(old)
    bench.scheduler.add(new)
    assert bench.step() == [("r1", 4), ("r2", 4)]
    assert bench.step() == [("r1", 1)]
    assert new.status is SequenceStatus.WAITING
    assert new.block_table == []
    bench.run_all()
    assert ("r2", 5) in [item for batch in bench.runner.batches for item in batch]
    assert new.num_output_tokens == 4


def test_a_prompt_that_waits_for_blocks_is_not_overtaken_by_a_newer_one() -> None:
    bench = Bench(num_blocks=5, max_prefill_tokens=8)
    bench.scheduler.add(make_sequence("r1", 6, 8))
    bench.step()
    bench.scheduler.add(make_sequence("r2", 14, 1))
    bench.scheduler.add(make_sequence("r3", 2, 1))
    while (batch := bench.step()) == [("r1", 1)]:
        pass
    assert batch == [("r2", 6), ("r3", 2)]
    bench.run_all()


def test_short_prompts_get_past_long_ones_which_go_on_at_half_speed() -> None:
    bench = Bench(num_blocks=64)
    for name, num_tokens in (("r1", 40), ("r2", 40), ("r3", 6), ("r4", 2)):
        bench.scheduler.add(make_sequence(name, num_tokens, 1))
    assert [bench.step() for _ in range(3)] == [
        [("r1", 4), ("r4", 2), ("r3", 2)],
        [("r1", 4), ("r3", 4)],
        [("r1", 4), ("r2", 4)],
    ]


def test_the_prompt_that_waits_longest_takes_what_the_others_leave() -> None:
    bench = Bench(num_blocks=64)
    bench.scheduler.add(make_sequence("r1", 40, 1))
    bench.scheduler.add(make_sequence("r2", 1, 1))
    assert bench.step() == [("r1", 7), ("r2", 1)]


def test_a_running_prompt_goes_on_while_a_shorter_one_finds_no_room() -> None:
    bench = Bench(num_blocks=9, max_prefill_tokens=4)
    bench.scheduler.add(make_sequence("r1", 12, 1))
    bench.scheduler.add(make_sequence("r2", 20, 1))
    assert bench.step() == [("r1", 2), ("r2", 2)]
    bench.scheduler.add(make_sequence("r3", 8, 1))
    assert bench.step() == [("r1", 2), ("r2", 2)]
    bench.run_all()


class SlowDevice:
    """Steps that take their time, by a clock of their own, and a scheduler that learns it."""

    def __init__(self, fixed_ms: float = 20, token_ms: float = 0.5) -> None:
        self.now_s = 0.0
        self.fixed_ms, self.token_ms = fixed_ms, token_ms
        self.scheduler = Scheduler(
            BlockManager(4000, 4),
            StepPace(100, lambda: self.now_s),
            max_batch_size=16,
            max_prefill_tokens=1000,
            adapters=AllResident(),
        )
        self._runner = FakeModel()

    def add(self, *names: str, num_prompt_tokens: int) -> None:
        """Prompts that run for long."""
        for name in names:
            self.scheduler.add(make_sequence(name, num_prompt_tokens, 10_000))

    def step(self) -> dict[str, int]:
        """The number of tokens of each sequence in the step."""
        batch = self.scheduler.schedule()
        num_tokens = sum(item.num_tokens for item in batch)
        self.now_s += (self.fixed_ms + self.token_ms * num_tokens) / 1e3
        self.scheduler.postprocess(batch, self._runner.run(batch))
        return {item.seq.request_id: item.num_tokens for item in batch}


def test_chunks_are_as_large_as_the_time_of_a_step_allows() -> None:
    device = SlowDevice()
    device.add("r1", num_prompt_tokens=3000)
    assert 150 <= [device.step() for _ in range(12)][-1]["r1"] <= 170


def test_the_time_of_a_step_is_shared_by_all_prompts_in_it() -> None:
    device = SlowDevice()
    device.add("r0", num_prompt_tokens=3000)
    for _ in range(12):
        device.step()
    device.add(*"abcdefgh", num_prompt_tokens=30)
    step = device.step()
    assert 150 <= sum(step.values()) <= 170
    assert 70 <= step["r0"] <= 90


def test_a_prompt_gets_on_however_long_a_step_takes() -> None:
    device = SlowDevice(fixed_ms=20, token_ms=0.5)
    device.add("row", num_prompt_tokens=2)
    for _ in range(10):
        device.step()
    device.token_ms = 1000
    device.add("r1", num_prompt_tokens=1000)
    assert min(device.step()["r1"] for _ in range(10)) == MIN_CHUNK_TOKENS


def test_a_step_without_prompt_tokens_comes_now_and_then_while_prompts_go_on() -> None:
    device = SlowDevice(fixed_ms=5)
    device.add("row", num_prompt_tokens=2)
    for _ in range(3):
        device.step()
    device.add(*"abcd", num_prompt_tokens=600)
    steps = [device.step() for _ in range(MAX_NUM_CHUNK_STEPS + 2)]
    assert [len(step) > 1 for step in steps] == [True] * MAX_NUM_CHUNK_STEPS + [False, True]


def test_who_gave_way_comes_before_who_came_later() -> None:
    bench = Bench(num_blocks=3, shares_prefixes=False)
    for name in ("r1", "r2"):
        bench.scheduler.add(make_sequence(name, 4, 4))
    bench.step()
    bench.scheduler.add(make_sequence("r3", 4, 4))
    bench.run_all()
    admitted = [name for batch in bench.runner.batches for name, num_tokens in batch if num_tokens > 1]
    assert admitted[:3] == ["r1", "r2", "r2"]


def test_who_gave_way_finds_what_nobody_took_meanwhile() -> None:
    bench = Bench(num_blocks=3)
    old, new = make_sequence("r1", 4, 4), make_sequence("r2", 4, 4)
    bench.scheduler.add(old)
    bench.scheduler.add(new)
    bench.run_all()
    assert bench.runner.batches[-3:] == [[("r2", 1)]] * 3
    assert new.num_cached_tokens == 0, "its prompt was computed for it"


def test_a_prompt_computes_what_the_cache_does_not_have() -> None:
    bench = Bench(max_prefill_tokens=32)
    first, second = make_sequence("r1", 11, 1), make_sequence("r2", 11, 1)
    second.token_ids = [*first.token_ids[:9], 98, 99]
    bench.scheduler.add(first)
    assert bench.step() == [("r1", 11)]
    bench.scheduler.add(second)
    assert bench.step() == [("r2", 3)]
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 8)


def test_what_a_failed_step_left_in_its_blocks_is_not_found() -> None:
    bench = Bench()
    failed, after = make_sequence("r1", 9, 1), make_sequence("r1", 9, 1)
    bench.scheduler.add(failed)
    bench.scheduler.schedule()  # and the runner raises
    bench.scheduler.finish(failed)
    check_blocks(bench.blocks)
    bench.scheduler.add(after)
    assert [bench.step(), bench.step()] == [[("r1", 8)], [("r1", 1)]]


def test_what_led_to_broken_logits_is_not_found() -> None:
    bench = Bench()
    broken, after = make_sequence("r1", 12, 1), make_sequence("r1", 12, 1)
    bench.scheduler.add(broken)
    bench.step()
    batch = bench.scheduler.schedule()
    ((seq, why),) = bench.scheduler.postprocess(batch, [drawn(None)])
    assert (seq, type(why)) == (broken, GenerationFailed)
    bench.scheduler.finish(broken)
    bench.scheduler.add(after)
    assert bench.step() == [("r1", 8)]


def test_a_finished_sequence_frees_its_blocks_wherever_it_is() -> None:
    bench = Bench()
    running, waiting = make_sequence("r1"), make_sequence("r2")
    bench.scheduler.add(running)
    bench.step()
    bench.scheduler.add(waiting)
    bench.scheduler.finish(running)
    bench.scheduler.finish(waiting)
    assert not bench.scheduler.has_work
    assert bench.blocks.num_free_blocks == 16


sequences = st.lists(st.tuples(st.integers(1, 24), st.integers(1, 8)), min_size=1, max_size=8)


@settings(max_examples=200, deadline=None)
@given(sequences, st.integers(8, 24), st.integers(1, 6), st.integers(1, 16), st.data())
def test_any_schedule_gives_every_sequence_the_tokens_it_gets_alone(
    shapes: list[tuple[int, int]], num_blocks: int, max_batch_size: int, budget: int, data: st.DataObject
) -> None:
    bench = Bench(num_blocks, max_batch_size, budget)
    # Every third has the same tokens, as far as it goes.
    seqs = [make_sequence(f"r{i % 3}", *shape) for i, shape in enumerate(shapes)]
    for seq in seqs:
        bench.scheduler.add(seq)
        for _ in range(data.draw(st.integers(0, 3))):
            if bench.scheduler.has_work:
                bench.step()
                check_blocks(bench.blocks, seqs)
    bench.run_all()
    check_blocks(bench.blocks)
    for i, (seq, shape) in enumerate(zip(seqs, shapes, strict=True)):
        alone = make_sequence(f"r{i % 3}", *shape)
        for _ in range(alone.max_tokens):
            alone.token_ids.append(letters(alone))
        assert seq.token_ids == alone.token_ids


def test_an_isolated_sequence_runs_alone_even_if_the_others_hold_all_blocks() -> None:
    scheduler = Scheduler(
        BlockManager(4, 4), unpaced(), max_batch_size=8, max_prefill_tokens=64, adapters=AllResident()
    )
    others = [make_sequence(f"r{i}", 7, 4) for i in range(2)]
    for seq in others:
        scheduler.add(seq)
    scheduler.postprocess(scheduler.schedule(), [drawn(1), drawn(1)])
    lone = make_sequence("lone", 5, 4)
    scheduler.add(lone)
    scheduler.isolate("lone")
    assert scheduler.schedule() == []
    scheduler.run_isolated()
    for _ in range(2):
        batch = scheduler.schedule()
        assert [item.seq for item in batch] == [lone]
        scheduler.postprocess(batch, [drawn(1)])
    assert [seq.status for seq in others] == [SequenceStatus.WAITING] * 2
    scheduler.isolate(None)
    assert len(scheduler.schedule()) > 1
