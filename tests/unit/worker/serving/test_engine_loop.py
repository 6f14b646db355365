"""How the engine loop ends."""

import queue
from unittest.mock import Mock

import pytest

from shared.queue.records import Claim, Held
from tests.streams import make_request
from worker.engine.engine import Engine
from worker.engine.sequence import OutOfDeviceMemory
from worker.serving.consumer import Arrival, Commands, Consumer
from worker.serving.engine_loop import EngineLoop


class Bench:
    """A loop whose engine always has work, on a clock that each step moves by a second."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.held = ["a request"]
        self.consumer = Mock(spec=Consumer, commands=Mock())
        self.consumer.commands.get.side_effect = queue.Empty
        self.engine = Mock(
            spec=Engine,
            has_work=True,
            is_stalled=False,
            step=self.step,
            expire_requests=list,
            settle_adapters=list,
        )
        self.loop = EngineLoop(self.engine, self.consumer, self.held, drain_s=10, clock=lambda: self.now_s)
        self.at_step = {}

    def step(self) -> list[object]:
        self.now_s += 1
        self.at_step.get(self.now_s, lambda: None)()
        if self.now_s > 100:
            pytest.fail("the loop does not end")
        return []


def test_a_drain_ends_when_its_time_is_over() -> None:
    bench = Bench()
    bench.at_step = {5: bench.loop.drain}
    bench.loop.run()
    assert bench.now_s == 16
    bench.consumer.drain.assert_called_once()


def test_a_drain_ends_as_soon_as_nothing_is_held() -> None:
    bench = Bench()
    bench.at_step = {5: bench.loop.drain, 7: bench.held.clear}
    bench.loop.run()
    assert bench.now_s == 7


def test_a_second_drain_ends_at_once() -> None:
    bench = Bench()
    bench.at_step = {5: bench.loop.drain, 6: bench.loop.drain}
    bench.loop.run()
    assert bench.now_s == 6


def test_a_step_out_of_memory_sheds_what_the_engine_names_and_the_others_count_as_good() -> None:
    bench, claim = Bench(), Claim(Held("r", "x"), make_request(request_id="r"), ())
    bench.held = [claim.held]
    bench.loop = EngineLoop(bench.engine, bench.consumer, bench.held, drain_s=10)
    bench.consumer.commands.get.side_effect = [Commands(add=[Arrival(claim)]), *[queue.Empty] * 9]
    bench.engine.add_request.return_value = []
    bench.engine.step = Mock(side_effect=[[], OutOfDeviceMemory, []])
    bench.engine.shed.return_value = "r", []
    turns = iter([False] * 3)
    bench.loop.run(should_stop=lambda: next(turns, True))
    bench.consumer.shed.assert_called_once_with(claim.held)
    assert bench.consumer.count_step.call_count == 2


def test_the_loop_ends_when_it_is_told_to_stop() -> None:
    bench = Bench()
    bench.loop.run(should_stop=lambda: bench.now_s == 3)
    assert bench.now_s == 3
