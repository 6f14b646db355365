"""Tests of how the engine loop ends."""

import queue
from collections.abc import Callable
from unittest.mock import Mock

import pytest

from shared.messages import SamplingParams
from shared.queue.records import Claim, Held
from tests.engines import InMemoryEngine
from tests.streams import make_request
from worker.engine.sequence import OutOfDeviceMemory
from worker.serving.commands import Arrival, Commands
from worker.serving.consumer import Consumer, HeldRequests
from worker.serving.engine_loop import EngineLoop


class Bench:
    """A loop whose engine has work for long, on a clock that each step moves by a second."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.at_step: dict[float, Callable[[], object]] = {}
        self.consumer = Mock(spec=Consumer, commands=queue.SimpleQueue(), outbox=queue.Queue())
        self.engine = InMemoryEngine(before_step=self.step)
        self.held = HeldRequests()
        self.loop = EngineLoop(
            self.engine,
            self.consumer,
            self.held,
            drain_s=10,
            worker_name="w1",
            clock=lambda: self.now_s,
        )
        self.add("r")

    def claim(self, request_id: str) -> Claim:
        """A request that is held, and not yet encoded."""
        sampling = SamplingParams(max_tokens=1000)
        claim = Claim(Held(request_id, "x"), make_request(request_id=request_id, sampling=sampling), ())
        self.held.add(claim)
        return claim

    def arrive(self, claim: Claim) -> None:
        """Puts a claimed request into the engine's inbox."""
        self.consumer.commands.put(Commands(add=[Arrival(claim, [[1, 2, 3]])]))

    def add(self, request_id: str) -> Held:
        """A request that is held, and on its way to the engine."""
        claim = self.claim(request_id)
        self.arrive(claim)
        return claim.held

    def step(self) -> None:
        self.now_s += 1
        self.at_step.get(self.now_s, lambda: None)()
        if self.now_s > 100:
            pytest.fail("the loop does not end")

    def run(self, num_steps: int) -> None:
        """Runs the loop for so many steps."""
        self.loop.run(should_stop=lambda: self.now_s == num_steps)


def test_a_drain_ends_when_its_time_is_over() -> None:
    bench = Bench()
    bench.at_step = {5: bench.loop.drain}
    bench.loop.run()
    assert bench.now_s == 16
    bench.consumer.drain.assert_called_once()


def test_a_drain_ends_as_soon_as_nothing_is_held() -> None:
    bench = Bench()
    bench.at_step = {5: bench.loop.drain, 7: lambda: bench.held.remove(["r"])}
    bench.loop.run()
    assert bench.now_s == 7


def test_a_second_drain_ends_at_once() -> None:
    bench = Bench()
    bench.at_step = {5: bench.loop.drain, 6: bench.loop.drain}
    bench.loop.run()
    assert bench.now_s == 6


def fail() -> None:
    raise OutOfDeviceMemory


def test_a_step_out_of_memory_sheds_its_newest_request() -> None:
    bench = Bench()
    newest = bench.add("newest")
    bench.at_step = {2: fail}
    bench.run(num_steps=3)
    bench.consumer.shed.assert_called_once_with(newest)
    assert not bench.engine.holds("newest")


def test_events_leave_under_the_claims_that_they_belong_to() -> None:
    bench = Bench()
    bench.run(num_steps=2)
    steps = [bench.consumer.outbox.get_nowait() for _ in range(2)]
    assert [[(append.held, append.event.event_no) for append in appends] for appends in steps] == [
        [(Held("r", "x"), 0)],
        [(Held("r", "x"), 1)],
    ]


def test_the_last_event_of_a_request_and_its_job_tell_the_times_and_the_worker() -> None:
    bench = Bench()
    claim = bench.claim("late")._replace(waited_s=2.5)
    bench.consumer.commands.put(Commands(add=[Arrival(claim, [[1, 2, 3]], encode_s=0.5)]))
    bench.consumer.commands.put(Commands(stop=["late"]))
    bench.run(num_steps=1)
    appends = bench.consumer.outbox.get_nowait()
    (last,) = [append for append in appends if append.event.is_terminal]
    assert (last.event.timings.queue_s, last.event.timings.encode_s) == (2.5, 0.5)
    assert last.event.timings.worker == "w1"
    assert (last.meta["queue_s"], last.meta["encode_s"]) == (2.5, 0.5)
    assert [append.event.timings for append in appends if append is not last] == [None]


def test_a_request_that_moved_away_while_it_was_encoded_is_not_taken_in() -> None:
    bench = Bench()
    bench.add("moved")
    bench.held.remove(["moved"])
    bench.run(num_steps=1)
    assert bench.engine.holds("r")
    assert not bench.engine.holds("moved")


def test_an_operator_may_stop_a_request_that_is_still_to_come() -> None:
    bench = Bench()
    late = bench.claim("late")
    bench.consumer.commands.put(Commands(stop=["late"]))
    bench.at_step = {1: lambda: bench.arrive(late)}
    bench.run(num_steps=2)
    (append,) = bench.consumer.outbox.get_nowait()
    assert append.held.request_id == "r"
    stopped, _ = bench.consumer.outbox.get_nowait()
    assert (stopped.held, stopped.event.error.code) == (late.held, "generation_stopped")


def test_a_stalled_engine_is_woken_by_what_it_waits_for() -> None:
    bench = Bench()
    bench.engine.wake()
    bench.consumer.wake_engine.assert_called_once()


def test_the_loop_ends_when_it_is_told_to_stop() -> None:
    bench = Bench()
    bench.run(num_steps=3)
    assert bench.now_s == 3
