"""Decides where each adapter is: in a slot on the device, in host memory, or only on disk."""

import logging
import queue
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Executor, Future
from typing import Generic, Protocol

from shared.errors import AdapterError
from shared.logs import fields
from worker.engine.host_cache import HostCache, W
from worker.engine.records import AdapterCounts

logger = logging.getLogger(__name__)


class Store(Protocol[W]):
    """Reads adapters from disk and fills the device's slots; see `worker.model.adapter_store`."""

    def read(self, name: str) -> W:
        """Reads an adapter from disk; may be called from any thread. Raises `AdapterError`."""
        ...

    def put(self, name: str, weights: W, slot: int) -> None:
        """Replaces a slot's contents. After an `AdapterError`, the slot's contents are undefined."""
        ...

    def clear(self, slot: int) -> None:
        """Frees the memory of a slot that no sequence uses any more."""
        ...


class AdapterCache(Generic[W]):
    """Two LRU caches of adapters: `num_slots` slots on the device, and `max_num_bytes` of host memory.

    Adapters of running sequences are not evicted from their slots. `executor` reads adapters from disk.
    Everything else, including the copy into a slot, happens in the engine's thread between two steps. A slot
    is freed before an adapter is read, so that weights never wait in memory for a free slot.
    """

    def __init__(
        self,
        store: Store[W],
        executor: Executor,
        *,
        num_slots: int,
        max_num_bytes: int,
        max_num_slot_bytes: int | None = None,
    ) -> None:
        """Starts with empty slots. `num_slots` is the maximum number of slots.

        There are fewer slots if `num_slots` adapters of the largest known size would take more than
        `max_num_slot_bytes` (None: no limit). If a still larger adapter is added later, the number of slots
        drops at once. A surplus slot is given up when the sequences of its adapter have ended. The larger
        adapter is not refused, because a worker that starts with it would serve it, too.
        """
        self._store = store
        self._executor = executor
        self.num_slots = num_slots
        self._max_num_slot_bytes = max_num_slot_bytes
        self._num_wanted_slots = num_slots
        self._known: dict[str, int] = {}
        """The number of bytes of each adapter, by name."""
        self._largest_num_bytes = 0
        self.on_read: Callable[[], None] = lambda: None
        """Called in another thread when an adapter has been read from disk and `settle` should be called."""
        self._slots: OrderedDict[str, int] = OrderedDict()
        """Resident adapters and their slots, least recently used first."""
        self._loading: dict[str, float] = {}
        """Adapters that are being read, with the time (`time.monotonic()`) at which the read began."""
        self._read: queue.SimpleQueue[tuple[str, Future[W]]] = queue.SimpleQueue()
        self._host: HostCache[W] = HostCache(max_num_bytes)
        self._failures: dict[str, AdapterError] = {}
        self.num_reads = 0
        """Number of reads from disk so far."""
        self.resident: tuple[str, ...] = ()
        """Resident adapters, least recently used first. Safe to read from any thread."""

    @property
    def num_cached_bytes(self) -> int:
        """Number of bytes of the adapters cached in host memory."""
        return self._host.num_bytes

    @property
    def counts(self) -> AdapterCounts:
        """The numbers of adapters in each place, and their sizes. Safe to read from any thread."""
        return _count(self._known, self.resident, self._host, self.num_slots, self.num_reads)

    @property
    def summary(self) -> str:
        """Text for a log line: the number of adapters on the device, in host memory, and only on disk."""
        limit, wanted = self._max_num_slot_bytes or 0, self._num_wanted_slots
        shortage = f" ({_mib(limit)} hold no more, {wanted} were wanted)" if self.num_slots < wanted else ""
        return _summarize(self.counts, self._largest_num_bytes, self._host.max_num_bytes, shortage)

    def keep(self, name: str, weights: W) -> None:
        """Adds an adapter, and caches it if host memory has room without an eviction.

        The weights replace earlier weights of the same name; no running request may use the earlier ones.
        While requests run, only the engine's thread may call this method.
        """
        self._known[name] = weights.num_bytes
        self._fit_slots(weights.num_bytes)
        self._host.remove(name)
        if name in self._slots:
            self._evict(name)
        if self._host.has_room(weights.num_bytes):
            self._host.add(name, weights)

    def fill_slots(self) -> None:
        """Makes cached adapters resident until all slots are full; call it after the last `keep`."""
        for name, weights in list(self._host.contents.items())[: self._num_free_slots]:
            self._fill_slot(name, weights)

    def slot(self, name: str) -> int:
        """Returns the slot of a resident adapter.

        Raises:
            AdapterError: the adapter is not resident.
        """
        if name not in self._slots:
            raise AdapterError(f"adapter {name!r} is not loaded")
        return self._slots[name]

    def bring(self, name: str | None, in_use: Collection[str | None]) -> bool:
        """Makes an adapter resident.

        If no slot is free, evicts the least recently used adapter that is not in `in_use`.

        Returns True if the adapter is resident now. Returns False if the adapter is still being read, if all
        slots are in use, or if the copy into a slot failed. After a failed copy, `settle` returns the error.
        """
        if name is None:
            return True
        weights = self._host.get(name)
        if name in self._slots:
            self._slots.move_to_end(name)
            self.resident = tuple(self._slots)
            return True
        if name in self._loading or not self._make_room(in_use):
            return False
        if weights is None:
            self._start_reading(name)
            return False
        try:
            self._fill_slot(name, weights)
        except AdapterError as error:
            self._fail(name, error)
            return False
        return True

    def is_loading(self, name: str | None) -> bool:
        """True while an adapter is being read from disk."""
        return name in self._loading

    def settle(self) -> dict[str, AdapterError]:
        """Copies newly read adapters into slots; returns the errors since the last call, by adapter name."""
        while not self._read.empty():
            name, future = self._read.get()
            started_s = self._loading.pop(name)
            try:
                weights = future.result()
                self._known[name] = weights.num_bytes
                # If `keep` lowered the number of slots during the read, there may be no slot left.
                if self._num_free_slots > 0:
                    self._fill_slot(name, weights)
            except AdapterError as error:
                self._fail(name, error)
                continue
            self._host.add(name, weights)
            took_ms = (time.monotonic() - started_s) * 1000
            logger.debug("adapter %r read in %.0f ms", name, took_ms, extra=fields("load_adapter"))
        failures, self._failures = self._failures, {}
        return failures

    def _fail(self, name: str, error: AdapterError) -> None:
        """Logs an error; `settle` will return a version for clients, without names of the host's folders."""
        logger.error("%s", error.message, extra=fields("load_adapter", adapter_name=name))
        self._failures[name] = AdapterError(f"adapter {name!r} can't be loaded: the worker's log says why")

    @property
    def _num_free_slots(self) -> int:
        return self.num_slots - len(self._slots) - len(self._loading)

    def _fit_slots(self, num_bytes: int) -> None:
        """Limits the number of slots after an adapter of `num_bytes` was added.

        Even if all slots held adapters of the largest known size, they would not exceed `max_num_slot_bytes`.
        """
        self._largest_num_bytes = max(self._largest_num_bytes, num_bytes)
        if self._max_num_slot_bytes is not None and self._largest_num_bytes:
            num_affordable = max(1, self._max_num_slot_bytes // self._largest_num_bytes)
            self.num_slots = min(self._num_wanted_slots, num_affordable)

    def _make_room(self, in_use: Collection[str | None]) -> bool:
        """Evicts adapters (several if `num_slots` fell) until a slot is free; False if all are in use."""
        while self._num_free_slots <= 0:
            victim = next((name for name in self._slots if name not in in_use), None)
            if victim is None:
                return False
            self._evict(victim)
        return True

    def _evict(self, name: str) -> None:
        has_extra_slots = max(self._slots.values()) >= self.num_slots
        slot = self._slots.pop(name)
        self.resident = tuple(self._slots)
        # If weights stayed in slots that are not filled again, all slots would exceed `max_num_slot_bytes`.
        if has_extra_slots:
            self._store.clear(slot)

    def _fill_slot(self, name: str, weights: W) -> None:
        slot = min(set(range(self.num_slots)) - set(self._slots.values()))
        self._store.put(name, weights, slot)
        self._slots[name] = slot
        self.resident = tuple(self._slots)

    def _start_reading(self, name: str) -> None:
        self._loading[name] = time.monotonic()
        self.num_reads += 1
        future = self._executor.submit(self._store.read, name)
        future.add_done_callback(lambda done: self._announce(name, done))

    def _announce(self, name: str, future: "Future[W]") -> None:
        self._read.put((name, future))
        self.on_read()


def _count(
    known: Mapping[str, int], resident: Collection[str], host: HostCache[W], num_slots: int, num_reads: int
) -> AdapterCounts:
    """Returns the counts; `known` has the number of bytes of each adapter."""
    return AdapterCounts(
        num_adapters=len(known),
        num_resident=len(resident),
        num_resident_bytes=sum(known[name] for name in resident),
        num_slots=num_slots,
        num_cached=len(host.names),
        num_cached_bytes=host.num_bytes,
        num_on_disk=len(known) - len(host.names.union(resident)),
        num_reads=num_reads,
    )


def _summarize(
    counts: AdapterCounts, largest_num_bytes: int, max_num_cached_bytes: int, shortage: str
) -> str:
    """Returns the counts as text; `shortage` says why there are fewer slots than configured."""
    max_num_slot_bytes = counts.num_slots * largest_num_bytes
    return (
        f"{counts.num_adapters}, the largest {_mib(largest_num_bytes)}; "
        f"{counts.num_resident} resident in {counts.num_slots} slots{shortage}, "
        f"{_mib(counts.num_resident_bytes)} of at most {_mib(max_num_slot_bytes)}; "
        f"{counts.num_cached} in host memory, "
        f"{_mib(counts.num_cached_bytes)} of at most {_mib(max_num_cached_bytes)}; "
        f"{counts.num_on_disk} on disk only"
    )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
