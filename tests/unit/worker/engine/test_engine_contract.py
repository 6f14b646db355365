"""The engine's port, on the engine of this project and on the double that serving is tested with."""

from collections.abc import Callable

import pytest

from shared.errors import AdapterError, InvalidRequest
from shared.messages import FinishReason, GenerationRequest, SamplingParams, StreamEvent, Usage
from tests.adapters import FakeStore, ManualExecutor
from tests.engines import InMemoryEngine
from tests.fakes import FakeModel, build_engine
from tests.streams import make_request
from worker.engine.adapter_cache import AdapterCache
from worker.engine.ports import Engine
from worker.engine.records import Prompts
from worker.engine.sequence import OutOfDeviceMemory


class Real:
    """The engine of this project over a fake model, whose adapter c can't be read."""

    def __init__(self) -> None:
        store, self._disk = FakeStore(2), ManualExecutor()
        store.broken.add("c")
        cache = AdapterCache(store, self._disk, num_slots=2, max_num_bytes=100)
        self._model = FakeModel(lambda seq: ord("x"), adapter_cache=cache)
        self._run, self._now_s = self._model.run, 0.0
        self.engine: Engine = build_engine(self._model, clock=lambda: self._now_s)

    def lack_memory(self, lacks: bool) -> None:
        def run(batch: object) -> object:
            raise OutOfDeviceMemory

        self._model.run = run if lacks else self._run

    def pass_limits(self) -> None:
        self._now_s += 100

    def read_adapters(self) -> None:
        self._disk.run()


class Double:
    """The double, whose adapter c can't be read."""

    def __init__(self) -> None:
        self._engine = InMemoryEngine(unreadable={"c": AdapterError("broken")})
        self.engine: Engine = self._engine

    def lack_memory(self, lacks: bool) -> None:
        def fail() -> None:
            raise OutOfDeviceMemory

        self._engine.before_step = fail if lacks else lambda: None

    def pass_limits(self) -> None:
        self._engine.overdue = {"limited"}

    def read_adapters(self) -> None:
        self._engine.wake()


Rig = Real | Double


@pytest.fixture(params=[Real, Double])
def rig(request: pytest.FixtureRequest) -> Rig:
    make: Callable[[], Rig] = request.param
    return make()


def request_of(name: str, adapter_name: str | None = None, **values: object) -> GenerationRequest:
    sampling = SamplingParams(temperature=0, max_tokens=3)
    messages = [{"role": "user", "content": "abc"}]
    return make_request(
        adapter_name, **({"request_id": name, "sampling": sampling, "messages": messages} | values)
    )


def add(rig: Rig, name: str, adapter_name: str | None = None, **values: object) -> None:
    options = {key: values.pop(key) for key in ("events", "alone") if key in values}
    request = request_of(name, adapter_name, **values)
    assert rig.engine.add_request(request, rig.engine.encode(request), **options) == []


def step(rig: Rig) -> list[str]:
    """The requests that a step brought events of."""
    return [output.request_id for output in rig.engine.step()]


def finish(rig: Rig) -> dict[str, list[StreamEvent]]:
    """The events of each request until nothing is left to run."""
    events: dict[str, list[StreamEvent]] = {}
    for _ in range(100):
        if not rig.engine.has_work:
            return events
        for request_id, event, meta in rig.engine.step():
            assert (meta is not None) == event.is_terminal
            events.setdefault(request_id, []).append(event)
    pytest.fail("the engine never came to an end")


def test_each_step_brings_a_token_of_each_request_and_the_last_one_its_usage(rig: Rig) -> None:
    add(rig, "r")
    add(rig, "of an adapter", "a")
    rig.engine.step(), rig.read_adapters(), rig.engine.settle_adapters()
    events = finish(rig)["of an adapter"]
    assert [(event.event_no, event.text, event.finish_reason) for event in events[-2:]] == [
        (1, "x", None),
        (2, "x", FinishReason.LENGTH),
    ]
    assert events[-1].usage == Usage(3, 3)
    assert rig.engine.remains.startswith("0 requests")


def test_only_the_last_of_many_sequences_ends_its_request(rig: Rig) -> None:
    add(rig, "r", messages=[], prompts=("abc", (1, 2, 3)), n=2)
    events = finish(rig)["r"]
    assert [event.event_no for event in events] == list(range(12))
    for index in range(4):
        assert [event.finish_reason for event in events if event.index == index] == [None, None, "length"]
    assert [event.usage for event in events] == [None] * 11 + [Usage(6, 12)]


def test_a_resumed_request_goes_on_behind_its_log(rig: Rig) -> None:
    add(rig, "r")
    whole = finish(rig)["r"]
    add(rig, "r", events=tuple(whole[:2]))
    assert finish(rig)["r"] == whole[2:]


def test_prompts_that_could_not_be_encoded_end_their_request_at_once(rig: Rig) -> None:
    prompts: Prompts = InvalidRequest("no", param="messages")
    ((request_id, event, _),) = rig.engine.add_request(request_of("r"), prompts)
    assert (request_id, event.event_no, event.error.message) == ("r", 0, "no")
    assert not rig.engine.holds("r")


@pytest.mark.parametrize("end", ["abort_request", "stop_request"])
def test_a_request_that_is_aborted_or_stopped_ends_once(rig: Rig, end: str) -> None:
    add(rig, "r")
    add(rig, "other")
    rig.engine.step()
    (output,) = getattr(rig.engine, end)("r")
    assert output.event.is_terminal
    assert output.event.event_no == 1
    assert getattr(rig.engine, end)("r") == []
    assert not rig.engine.holds("r")
    assert finish(rig).keys() == {"other"}


def test_a_dropped_request_ends_without_an_event(rig: Rig) -> None:
    add(rig, "r")
    rig.engine.step()
    rig.engine.drop_request("r")
    assert not rig.engine.has_work
    assert finish(rig) == {}


def test_a_request_that_is_added_again_begins_anew(rig: Rig) -> None:
    add(rig, "r")
    rig.engine.step()
    add(rig, "r")
    assert [event.event_no for event in finish(rig)["r"]] == [0, 1, 2]


def test_a_request_that_must_be_alone_waits_for_the_word_and_then_runs_without_the_others(rig: Rig) -> None:
    add(rig, "before")
    assert step(rig) == ["before"]
    add(rig, "suspect", alone=True, n=2)
    add(rig, "behind")
    assert (step(rig), rig.engine.is_stalled) == ([], True)
    rig.engine.run_isolated()
    assert set(step(rig) + step(rig)) == {"suspect"}
    assert not rig.engine.is_stalled
    rig.engine.end_isolation()
    assert finish(rig).keys() == {"before", "suspect", "behind"}


def test_the_end_of_a_request_that_runs_alone_lets_the_others_run(rig: Rig) -> None:
    add(rig, "other")
    add(rig, "suspect", alone=True, n=2)
    rig.engine.abort_request("suspect")
    assert finish(rig).keys() == {"other"}


def test_the_newest_request_of_a_step_without_memory_makes_room(rig: Rig) -> None:
    add(rig, "old")
    add(rig, "new")
    rig.lack_memory(True)
    with pytest.raises(OutOfDeviceMemory):
        rig.engine.step()
    rig.lack_memory(False)
    before = rig.engine.max_num_sequences
    assert rig.engine.shed() == ("new", [])
    assert rig.engine.max_num_sequences < before
    assert finish(rig).keys() == {"old"}


def test_a_request_that_has_no_memory_for_all_its_sequences_runs_fewer_at_once(rig: Rig) -> None:
    add(rig, "r", n=3)
    rig.lack_memory(True)
    with pytest.raises(OutOfDeviceMemory):
        rig.engine.step()
    rig.lack_memory(False)
    assert rig.engine.shed() == (None, [])
    assert len({event.index for event in finish(rig)["r"]}) == 3


def test_a_request_that_has_no_memory_even_alone_ends_with_an_error(rig: Rig) -> None:
    add(rig, "r")
    rig.lack_memory(True)
    with pytest.raises(OutOfDeviceMemory):
        rig.engine.step()
    request_id, (output,) = rig.engine.shed()
    assert (request_id, output.request_id, output.event.error.code) == (None, "r", "generation_failed")
    assert not rig.engine.has_work


def test_a_request_over_its_limit_ends_with_an_error(rig: Rig) -> None:
    add(rig, "limited", generation_limit_s=10.0)
    add(rig, "free")
    assert rig.engine.expire_requests() == []
    rig.pass_limits()
    (output,) = rig.engine.expire_requests()
    assert (output.request_id, output.event.error.code) == ("limited", "generation_timeout")
    assert finish(rig).keys() == {"free"}


def test_an_adapter_that_cant_be_read_ends_its_requests_and_wakes_the_loop_for_it(rig: Rig) -> None:
    woken: list[bool] = []
    rig.engine.call_when_ready(lambda: woken.append(True))
    add(rig, "r", "c")
    add(rig, "wide", "c", n=2)
    rig.engine.step()
    assert not rig.engine.has_work
    rig.read_adapters()
    assert woken
    assert {output.request_id for output in rig.engine.settle_adapters()} == {"r", "wide"}
    assert rig.engine.settle_adapters() == []
    assert not rig.engine.holds("r")


def test_it_tells_what_it_serves(rig: Rig) -> None:
    engine = rig.engine
    assert [model.version for model in engine.served] == ["m1", "a1", "b1", "c1"]
    assert engine.max_model_len == 64
    assert engine.adapters.num_slots >= len(engine.adapters.resident)
    assert engine.forward_state == "eager"
