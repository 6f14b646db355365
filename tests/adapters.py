"""Doubles for the adapter cache: a disk and a device that check what they are asked, and reads that wait."""

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, NamedTuple

from shared.errors import AdapterError
from worker.engine.sequence import Batch


class FakeWeights(NamedTuple):
    """Weights of one adapter."""

    name: str
    num_bytes: int = 10


class FakeStore:
    """Adapters on disk and in slots, by name."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.slots: dict[int, str] = {}
        self.sizes: dict[str, int] = {}
        """The size of the weights that were last put into a slot, by adapter."""
        self.broken: set[str] = set()

    def read(self, name: str) -> FakeWeights:
        if name in self.broken:
            raise AdapterError(f"adapter {name!r} at /srv/{name} is broken")
        return FakeWeights(name)

    def put(self, name: str, weights: FakeWeights, slot: int) -> None:
        assert weights.name == name
        if name in self.broken:
            raise AdapterError(f"adapter {name!r} at /srv/{name} does not fit")
        assert 0 <= slot < self.num_slots
        self.slots[slot] = name
        self.sizes[name] = weights.num_bytes

    def clear(self, slot: int) -> None:
        del self.slots[slot]

    def check(self, batch: Batch, slot_of: Callable[[str], int]) -> None:
        """Fails if a sequence of a batch runs with a slot that holds another adapter than its own."""
        for name in {item.seq.adapter_name for item in batch} - {None}:
            assert self.slots[slot_of(str(name))] == name


class ManualExecutor(Executor):
    """Runs what was submitted when it is told to."""

    def __init__(self) -> None:
        self.calls: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.calls.append((future, lambda: fn(*args, **kwargs)))
        return future

    def run(self) -> int:
        """Runs all calls; how many there were."""
        calls, self.calls = self.calls, []
        for future, call in calls:
            try:
                future.set_result(call())
            except AdapterError as error:
                future.set_exception(error)
        return len(calls)
