"""Chunks of prompts sized by time, on a device whose speed is given."""

from collections.abc import Callable

import pytest

from worker.step_pace import MAX_STRETCH, MIN_CHUNK_TOKENS, MIN_STRETCH, StepPace

Cost = Callable[[int, int], float]


def usual(num_rows: int, num_prefill_tokens: int) -> float:
    """Milliseconds of a step on a small CPU."""
    return 25 + 1.2 * num_rows + 0.5 * num_prefill_tokens


class Device:
    """Takes as long as `cost_ms` says, by a clock of its own."""

    def __init__(self, cost_ms: Cost = usual, step_target_ms: float = 100) -> None:
        self.cost_ms = cost_ms
        self.now_s = 0.0
        self.pace = StepPace(step_target_ms, lambda: self.now_s)

    def step(self, num_rows: int, num_prefill_tokens: int | None = None, slower: float = 1) -> float:
        """Runs a step with as many prompt tokens as the pace says; its milliseconds."""
        if num_prefill_tokens is None:
            num_prefill_tokens = self.pace.num_prefill_tokens(num_rows)
        self.pace.start_step()
        took_ms = self.cost_ms(num_rows, num_prefill_tokens) * slower
        self.now_s += took_ms / 1e3
        self.pace.record(num_rows, num_prefill_tokens)
        return took_ms

    def settle(self, num_rows: int, *, num_decodes: int = 20) -> float:
        """Steps without prompt tokens, then with them; the milliseconds of the last."""
        for _ in range(num_decodes):
            self.step(num_rows, 0)
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
    device.step(1, 0)
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
    device.step(16, 0, slower=20)
    assert device.step(16) == pytest.approx(before, rel=0.25)


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
    assert device.settle(0, num_decodes=0) == pytest.approx(100, rel=0.1)


def test_a_fast_stream_is_slowed_to_a_third_at_most() -> None:
    device = Device(lambda rows, tokens: 5 + tokens / 50)
    assert device.settle(4) == pytest.approx(5 * MAX_STRETCH, rel=0.1)


def test_prompts_get_on_beside_rows_that_take_the_whole_target() -> None:
    device = Device(lambda rows, tokens: 300 + tokens)
    assert device.settle(64) == pytest.approx(300 * MIN_STRETCH, rel=0.1)


def test_a_prompt_alone_gets_on_though_a_step_without_it_seems_to_take_the_whole_target() -> None:
    device = Device()
    device.settle(16)
    for _ in range(30):
        device.step(16, 0, slower=20)
    assert device.settle(0, num_decodes=0) > 90


def test_a_chunk_is_never_so_small_that_a_prompt_never_ends() -> None:
    device = Device(lambda rows, tokens: 10 + (500 if tokens else 0))
    device.settle(4)
    assert device.pace.num_prefill_tokens(4) == MIN_CHUNK_TOKENS
