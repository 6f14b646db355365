"""Chunks of prompts sized by time, on a device whose speed is given."""

from collections.abc import Callable, Sequence

import pytest

from worker.engine.step_pace import (
    FIRST_CHUNK_TOKENS,
    MAX_NUM_CHUNK_STEPS,
    MAX_STRETCH,
    MIN_STRETCH,
    Chunk,
    StepPace,
)

Cost = Callable[[int, int], float]


def usual(num_rows: int, num_prefill_tokens: int) -> float:
    """Milliseconds of a step on a small CPU."""
    return 25 + 1.2 * num_rows + 0.5 * num_prefill_tokens


class Device:
    """Takes as long as `cost_ms` says, by a clock of its own."""

    def __init__(
        self, cost_ms: Cost = usual, step_target_ms: float = 100, *, chunk_ms: float = 0, pair_ms: float = 0
    ) -> None:
        """`chunk_ms`: of each step with prompt tokens; `pair_ms`: of a token and one that it attends to."""
        self.cost_ms = cost_ms
        self.chunk_ms, self.pair_ms = chunk_ms, pair_ms
        self.now_s = 0.0
        self.pace = StepPace(step_target_ms, lambda: self.now_s)

    def step(self, num_rows: int, num_tokens_before: int = 0, *, slower: float = 1) -> float:
        """Runs a step with a chunk of the size that the pace says; its milliseconds."""
        num_ms = self.pace.prefill_ms(num_rows)
        chunk = Chunk(int(self.pace.num_tokens(num_ms, num_tokens_before)), num_tokens_before)
        return self.run(num_rows, [chunk] if chunk.num_tokens else [], slower)

    def decode(self, num_rows: int, *, slower: float = 1) -> float:
        """Runs a step without prompt tokens; its milliseconds."""
        return self.run(num_rows, [], slower)

    def run(self, num_rows: int, chunks: Sequence[Chunk], slower: float = 1) -> float:
        """Runs a step; its milliseconds."""
        self.pace.start_step()
        took_ms = self.cost_ms(num_rows, sum(chunk.num_tokens for chunk in chunks)) * slower
        for chunk in chunks:
            took_ms += self.pair_ms * chunk.num_tokens * (chunk.num_tokens_before + chunk.num_tokens / 2)
        self.now_s += (took_ms + self.chunk_ms * bool(chunks)) / 1e3
        self.pace.record(num_rows, chunks)
        return took_ms + self.chunk_ms * bool(chunks)

    def settle(self, num_rows: int, *, num_decodes: int = 20) -> float:
        """Steps without prompt tokens, then with them; the milliseconds of the last."""
        for _ in range(num_decodes):
            self.decode(num_rows)
        return [self.step(num_rows) for _ in range(20)][-1]


def test_steps_with_prompt_tokens_come_near_the_target() -> None:
    assert Device().settle(16) == pytest.approx(100, rel=0.05)
    assert Device().settle(0, num_decodes=0) == pytest.approx(100, rel=0.05)


def test_the_estimate_follows_the_number_of_running_rows() -> None:
    device = Device()
    device.settle(2)
    device.settle(30)
    for num_rows in (8, 16, 24):
        assert device.step(num_rows) == pytest.approx(100, rel=0.15)


def test_rows_that_join_while_prompts_go_on_do_not_lengthen_the_steps() -> None:
    device = Device()
    device.step(0)
    device.decode(1)
    assert max(device.step(num_rows) for num_rows in range(1, 17)) < 110


def test_one_slow_step_changes_little() -> None:
    device = Device()
    before = device.settle(16)
    device.step(16, slower=20)
    assert device.step(16) == pytest.approx(before, rel=0.25)
    assert [device.step(16) for _ in range(5)][-1] == pytest.approx(before, rel=0.1)


def test_one_slow_step_without_prompt_tokens_changes_little() -> None:
    device = Device()
    before = device.settle(16)
    device.decode(16, slower=20)
    assert device.step(16) == pytest.approx(before, rel=0.25)


def test_a_burst_of_prompts_that_takes_the_cores_of_some_steps_does_not_lengthen_those_that_follow() -> None:
    device = Device(lambda rows, tokens: 8 + rows + 0.5 * tokens)
    before = device.settle(16)
    for _ in range(3):
        device.decode(16, slower=2.3)
    assert device.step(16) < 1.25 * before


def test_a_device_that_becomes_slower_gets_smaller_chunks_within_a_few_steps() -> None:
    device = Device()
    device.settle(16)
    device.cost_ms = lambda rows, tokens: usual(rows, 4 * tokens)
    first, *_, last = [device.step(16) for _ in range(8)]
    assert first > 200
    assert last < 120


def test_a_device_that_becomes_faster_gets_larger_chunks() -> None:
    device = Device(lambda rows, tokens: 10 + 5 * tokens)
    device.settle(0, num_decodes=3)
    device.cost_ms = lambda rows, tokens: 10 + tokens / 10
    device.settle(0, num_decodes=0)
    assert device.settle(0, num_decodes=0) == pytest.approx(100, rel=0.1)


def test_a_fast_stream_is_slowed_by_the_largest_stretch_at_most() -> None:
    device = Device(lambda rows, tokens: 5 + tokens / 50)
    assert device.settle(4) == pytest.approx(5 * MAX_STRETCH, rel=0.1)


def test_prompts_get_on_beside_rows_that_take_the_whole_target() -> None:
    device = Device(lambda rows, tokens: 300 + tokens)
    assert device.settle(64) == pytest.approx(300 * MIN_STRETCH, rel=0.1)


def test_a_prompt_alone_gets_on_though_a_step_without_it_seems_to_take_the_whole_target() -> None:
    device = Device()
    device.settle(16)
    for _ in range(30):
        device.decode(16, slower=20)
    assert device.settle(0, num_decodes=0) > 90


def test_a_chunk_far_into_a_prompt_takes_no_longer_than_one_at_its_beginning() -> None:
    device = Device(chunk_ms=5, pair_ms=0.0005)
    device.settle(16)
    for _ in range(3):
        for num_tokens_before in range(0, 1000, 50):
            took_ms = device.step(16, num_tokens_before)
    assert took_ms == pytest.approx(100, rel=0.05)
    assert device.step(16, 0) == pytest.approx(100, rel=0.2)


def test_chunks_of_many_prompts_count_as_what_they_cost_together() -> None:
    device = Device(pair_ms=0.001)
    device.settle(16)
    for num_tokens_before in [0, 500, 1000] * 10:
        device.step(16, num_tokens_before)
    chunks = [Chunk(10, before) for before in (0, 300, 600)]
    expected_ms = device.run(16, chunks) - usual(16, 0)
    assert sum(map(device.pace.chunk_ms, chunks)) == pytest.approx(expected_ms, rel=0.2)


def test_where_no_time_is_left_no_token_fits() -> None:
    device = Device(pair_ms=0.001)
    for num_tokens_before in [0, 500, 1000] * 10:
        device.step(0, num_tokens_before)
    assert device.pace.num_tokens(400, 100_000) < 1
    assert device.pace.num_tokens(400, 0) > 100


def test_what_rows_cost_is_looked_at_again_while_prompts_go_on() -> None:
    device = Device()
    device.settle(16)
    device.cost_ms = lambda rows, tokens: 2 * usual(rows, tokens)
    for _ in range(20 * MAX_NUM_CHUNK_STEPS):
        device.step(16)
    assert device.decode(16) == pytest.approx(2 * usual(16, 0))
    assert device.step(16) == pytest.approx(2 * MIN_STRETCH * usual(16, 0), rel=0.1)


def test_a_prompt_beside_no_rows_is_never_interrupted() -> None:
    device = Device()
    assert min(device.step(0) for _ in range(3 * MAX_NUM_CHUNK_STEPS)) > usual(0, 10)


def test_while_nothing_is_known_a_chunk_is_of_a_fixed_size() -> None:
    pace = StepPace(100, lambda: 0.0)
    assert pace.num_tokens(pace.prefill_ms(0), 0) == pytest.approx(FIRST_CHUNK_TOKENS)
