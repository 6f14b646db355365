"""Slots, host memory and disk: who stays, who leaves, how requests wait for an adapter and fail with it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.messages import SamplingParams, StreamEvent
from tests.adapters import FakeStore, FakeWeights, ManualExecutor
from tests.fakes import FakeModel, build_engine, letters
from tests.streams import make_request
from worker.engine.adapter_cache import AdapterCache
from worker.engine.block_manager import BlockManager
from worker.engine.records import Output
from worker.engine.sequence import Batch, Sampled, Sequence

NAMES = ("a", "b", "c", "d", "e", "f")


class CheckingRunner(FakeModel):
    """Refuses a batch whose adapters are not all resident."""

    def __init__(self, store: FakeStore, adapters: AdapterCache[FakeWeights]) -> None:
        super().__init__(adapter_names=NAMES, adapter_cache=adapters)
        self._store = store
        self._slot_of = adapters.slot

    def run(self, batch: Batch) -> list[Sampled]:
        self._store.check(batch, self._slot_of)
        return super().run(batch)


class Bench:
    """A cache over fakes; an engine on it."""

    def __init__(
        self, num_slots: int = 2, max_num_bytes: int = 30, max_num_slot_bytes: int | None = None
    ) -> None:
        self.store = FakeStore(num_slots)
        self.disk = ManualExecutor()
        self.cache = AdapterCache(
            self.store,
            self.disk,
            num_slots=num_slots,
            max_num_bytes=max_num_bytes,
            max_num_slot_bytes=max_num_slot_bytes,
        )
        self.blocks = BlockManager(64, 4)
        self.runner = CheckingRunner(self.store, self.cache)
        self.engine = build_engine(self.runner, self.blocks)
        self.events: dict[str, list[StreamEvent]] = {}

    def add(self, request_id: str, adapter_name: str | None, num_tokens: int = 4, **options: bool) -> None:
        request = make_request(
            adapter_name,
            request_id=request_id,
            messages=[{"role": "user", "content": "hello"}],
            sampling=SamplingParams(temperature=0, max_tokens=num_tokens),
        )
        assert self.engine.add_request(request, self.engine.encode(request), **options) == []

    def step(self) -> None:
        """One turn of the engine loop."""
        appends: list[Output] = self.engine.settle_adapters()
        if self.engine.has_work:
            appends += self.engine.step()
        for append in appends:
            self.events.setdefault(append.request_id, []).append(append.event)

    def finish(self) -> None:
        for _ in range(1000):
            self.step()
            if not (self.disk.run() or self.engine.has_work):
                return
        pytest.fail("the engine never came to an end")

    def bring(self, name: str, *in_use: str) -> bool:
        """Brings an adapter, and reads it where that is needed."""
        is_ready = self.cache.bring(name, in_use)
        self.disk.run()
        self.cache.settle()
        return is_ready


def test_an_adapter_is_read_once_and_then_resident() -> None:
    bench = Bench()
    assert not bench.bring("a")
    assert bench.bring("a")
    assert bench.cache.num_reads == 1
    assert bench.cache.resident == ("a",)


def test_the_least_recently_used_one_gives_its_slot() -> None:
    bench = Bench()
    for name in ("a", "b", "a"):
        bench.bring(name)
    assert bench.cache.resident == ("b", "a")
    bench.bring("c")
    assert set(bench.store.slots.values()) == {"a", "c"}


def test_one_that_left_its_slot_comes_back_from_host_memory_at_once() -> None:
    bench = Bench()
    for name in ("a", "b", "c"):
        bench.bring(name)
    assert bench.bring("a")
    assert bench.cache.num_reads == 3


def test_one_that_left_host_memory_is_read_again() -> None:
    bench = Bench(max_num_bytes=20)
    for name in ("a", "b", "c"):
        bench.bring(name)
    assert bench.cache.num_cached_bytes == 20
    assert not bench.bring("a")
    assert bench.cache.num_reads == 4


def test_no_adapter_in_use_gives_its_slot_and_nothing_is_read_for_one_that_finds_none() -> None:
    bench = Bench()
    for name in ("a", "b"):
        bench.bring(name)
    assert not bench.bring("c", "a", "b")
    assert set(bench.store.slots.values()) == {"a", "b"}
    assert bench.cache.num_reads == 2
    bench.bring("c", "b")
    assert set(bench.store.slots.values()) == {"b", "c"}


def test_at_the_start_as_many_are_kept_as_fit() -> None:
    bench = Bench(num_slots=2, max_num_bytes=30)
    for name in NAMES:
        bench.cache.keep(name, FakeWeights(name))
    bench.cache.fill_slots()
    assert set(bench.store.slots.values()) == {"a", "b"}
    assert bench.cache.num_cached_bytes == 30
    assert bench.cache.summary == (
        "6, the largest 0.0 MiB; 2 resident in 2 slots, 0.0 MiB of at most 0.0 MiB; "
        "3 in host memory, 0.0 MiB of at most 0.0 MiB; "
        "3 on disk only"
    )


def test_there_are_no_more_slots_than_memory_has_for_the_largest_adapter() -> None:
    store, mib = FakeStore(4), 2**20
    cache = AdapterCache(
        store, ManualExecutor(), num_slots=4, max_num_bytes=100 * mib, max_num_slot_bytes=25 * mib
    )
    for name, size in zip(NAMES, (2, 5, 10, 3), strict=False):
        cache.keep(name, FakeWeights(name, size * mib))
        assert not store.slots  # what leaves a slot leaves its memory only when another takes it
    cache.fill_slots()
    assert cache.num_slots == 2
    assert set(store.slots.values()) == set(cache.resident)
    assert len(store.slots) == 2
    assert cache.summary == (
        "4, the largest 10.0 MiB; 2 resident in 2 slots (25.0 MiB hold no more, 4 were wanted), "
        "7.0 MiB of at most 20.0 MiB; "
        "4 in host memory, 20.0 MiB of at most 100.0 MiB; 0 on disk only"
    )


def test_an_adapter_larger_than_the_memory_for_slots_gets_one_all_the_same() -> None:
    cache = AdapterCache(FakeStore(1), ManualExecutor(), num_slots=4, max_num_bytes=99, max_num_slot_bytes=9)
    cache.keep("a", FakeWeights("a"))
    cache.fill_slots()
    assert (cache.num_slots, cache.resident) == (1, ("a",))


def test_a_larger_adapter_added_while_others_run_takes_slots_from_them_only_as_they_end() -> None:
    bench = Bench(num_slots=4, max_num_bytes=100, max_num_slot_bytes=40)
    for name in "abcd":
        bench.bring(name)
    bench.cache.keep("e", FakeWeights("e", 20))
    assert bench.cache.num_slots == 2
    assert bench.bring("a")
    assert not bench.bring("e", *"abcd")
    assert not bench.bring("e", "a", "b")
    assert bench.bring("e", "a")
    assert bench.bring("f") or bench.bring("f")
    assert set(bench.cache.resident) == {"e", "f"}
    assert sorted(bench.store.slots.values()) == ["e", "f"]  # no weights are left in the slots that are gone


def test_a_read_that_ends_after_a_larger_adapter_took_its_slot_is_kept_in_host_memory() -> None:
    bench = Bench(num_slots=2, max_num_bytes=100, max_num_slot_bytes=20)
    bench.bring("a")
    bench.cache.bring("b", ())
    bench.cache.keep("e", FakeWeights("e", 20))
    bench.disk.run()
    assert bench.cache.settle() == {}
    assert bench.cache.resident == ("a",)
    assert bench.bring("b")
    assert (bench.cache.resident, bench.cache.num_reads) == (("b",), 2)


def test_new_weights_of_a_known_adapter_replace_the_old_ones_in_host_memory_and_slot() -> None:
    bench = Bench(num_slots=2, max_num_bytes=30)
    bench.bring("a")
    bench.cache.keep("a", FakeWeights("a", 25))
    assert (bench.cache.num_cached_bytes, bench.cache.resident) == (25, ())
    assert bench.bring("a")
    assert bench.store.sizes["a"] == 25
    assert "1, the largest" in bench.cache.summary
    bench.cache.keep("a", FakeWeights("a", 31))
    assert bench.cache.num_cached_bytes == 0


def test_an_adapter_larger_than_host_memory_is_served_and_not_cached() -> None:
    bench = Bench(max_num_bytes=5)
    bench.add("r", "a")
    bench.finish()
    assert bench.events["r"][-1].usage is not None
    assert bench.cache.num_cached_bytes == 0


def test_others_decode_while_an_adapter_is_read() -> None:
    bench = Bench()
    bench.add("waits", "a")
    bench.add("runs", None, 8)
    for _ in range(3):
        bench.step()
    assert len(bench.events["runs"]) == 3
    assert "waits" not in bench.events
    bench.disk.run()
    bench.step()
    assert len(bench.events["waits"]) == 1
    assert len(bench.events["runs"]) == 4


def test_an_engine_that_only_waits_for_the_disk_has_no_work() -> None:
    bench = Bench()
    bench.add("r", "a")
    bench.step()
    assert not bench.engine.has_work
    bench.disk.run()
    bench.step()
    assert len(bench.events["r"]) == 1


def test_a_request_whose_adapter_is_being_read_can_be_aborted() -> None:
    bench = Bench()
    bench.add("r", "a")
    bench.step()
    (append,) = bench.engine.abort_request("r")
    assert append.event.finish_reason == "abort"
    bench.finish()
    assert bench.cache.resident == ("a",)


@pytest.mark.parametrize("fails_in", ["read", "put"])
def test_a_failure_tells_clients_the_name_of_the_adapter_and_only_the_log_its_folder(
    fails_in: str, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench()
    bench.add("r", "a")
    if fails_in == "read":
        bench.store.broken = {"a"}
    bench.step()
    bench.disk.run()
    bench.store.broken = {"a"}
    bench.finish()
    error = bench.events["r"][-1].error
    assert error is not None
    assert error.message == "adapter 'a' can't be loaded: the worker's log says why"
    assert "/srv/a" in caplog.text


def test_a_failed_read_ends_its_own_requests_only_and_the_next_one_tries_again() -> None:
    bench = Bench()
    bench.store.broken = {"a"}
    for request_id, adapter_name in (("r1", "a"), ("r2", "a"), ("good", "b"), ("base", None)):
        bench.add(request_id, adapter_name)
    bench.finish()
    assert [bench.events[name][-1].error.code for name in ("r1", "r2")] == ["adapter_error"] * 2
    assert all(bench.events[name][-1].error is None for name in ("good", "base"))
    bench.store.broken = set()
    bench.add("r3", "a")
    bench.finish()
    assert bench.events["r3"][-1].error is None


def test_an_adapter_that_no_longer_fits_into_its_slot_ends_its_own_requests_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bench = Bench(num_slots=1)
    for name in ("a", "b"):
        bench.bring(name)
    bench.store.broken = {"a"}
    bench.add("bad", "a")
    bench.add("good", None)
    bench.finish()
    assert bench.events["bad"][-1].error.code == "adapter_error"
    assert bench.events["good"][-1].error is None
    assert bench.cache.num_reads == 2
    (record,) = caplog.records
    assert (record.levelname, record.adapter_name) == ("ERROR", "a")


def test_a_request_that_runs_alone_gets_a_slot_from_those_that_wait_for_it() -> None:
    bench = Bench(num_slots=1)
    bench.add("other", "a", 8)
    bench.step()
    bench.disk.run()
    bench.step()
    bench.add("lone", "b", alone=True)
    bench.engine.run_isolated()
    bench.step()
    bench.disk.run()
    bench.step()
    assert {name: len(events) for name, events in bench.events.items()} == {"other": 1, "lone": 1}
    bench.engine.end_isolation()
    bench.finish()
    assert {len(bench.events[name]) for name in ("other", "lone")} == {8, 4}


def expected(adapter_name: str | None, num_tokens: int) -> str:
    prompt = [ord(character) for character in "hello"]
    seq = Sequence("r", 0, adapter_name, SamplingParams(), prompt, len(prompt), num_tokens)
    for _ in range(num_tokens):
        seq.token_ids.append(letters(seq))
    return "".join(map(chr, seq.output_token_ids))


requests = st.lists(st.tuples(st.sampled_from([None, *NAMES]), st.integers(1, 8)), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(requests, st.integers(1, 4), st.integers(0, 40), st.data())
def test_any_order_of_steps_and_reads_gives_every_request_its_own_tokens(
    shapes: list[tuple[str | None, int]], num_slots: int, max_num_bytes: int, data: st.DataObject
) -> None:
    bench = Bench(num_slots, max_num_bytes, 100 * num_slots)
    added_at, size = data.draw(st.integers(0, 12)), data.draw(st.integers(41, 400))
    for number, (adapter_name, num_tokens) in enumerate(shapes):
        bench.add(str(number), adapter_name, num_tokens)
        if number == added_at:
            bench.cache.keep("larger", FakeWeights("larger", size))
        for _ in range(data.draw(st.integers(0, 3))):
            bench.step()
        if data.draw(st.booleans()):
            bench.disk.run()
    bench.finish()
    for number, shape in enumerate(shapes):
        assert "".join(event.text for event in bench.events[str(number)]) == expected(*shape)
    assert bench.blocks.num_free_blocks == 64
    assert all(bench.store.slots[bench.cache.slot(name)] == name for name in bench.cache.resident)
    assert bench.cache.num_cached_bytes <= max_num_bytes
    assert f"; {bench.cache.num_cached_bytes // 10} in host memory" in bench.cache.summary


def test_a_step_that_waits_for_an_adapter_runs_and_records_nothing() -> None:
    bench = Bench(num_slots=1)
    bench.add("others", "a", num_tokens=8)
    bench.disk.run()
    bench.engine.settle_adapters()
    bench.engine.step()
    bench.add("lone", "b", alone=True)
    bench.engine.run_isolated()
    num_batches = len(bench.runner.batches)
    assert bench.engine.has_work
    assert bench.engine.step() == []
    assert bench.engine.is_stalled
    assert len(bench.runner.batches) == num_batches
