"""Predicts which adapters a worker's slots will hold when it runs the requests chosen so far."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class AdapterSlots(NamedTuple):
    """The adapter slots on a worker's device, and the adapters in them."""

    num: int
    resident: Sequence[str]
    """Queues whose adapters have a slot, running or not, least recently used first."""


class SlotPlan:
    """The predicted running and resident adapters. Evictions are LRU, as in the engine's `AdapterCache`."""

    def __init__(self, base: str, running: Mapping[str, int], slots: AdapterSlots) -> None:
        """`base`: the base model's queue, which needs no slot. `running`: number of sequences by queue."""
        self.used = {base, *(queue for queue, num_sequences in running.items() if num_sequences > 0)}
        """Queues whose adapters run, and always the base's queue."""
        self.resident = self.used | set(slots.resident)
        self._num = slots.num
        self._by_age = slots.resident
        self._evict()

    @property
    def num_free(self) -> int:
        """Number of slots that no running adapter uses; negative if more adapters run than slots exist."""
        return self._num - (len(self.used) - 1)

    @property
    def num_empty(self) -> int:
        """Number of slots that hold no adapter."""
        return self._num - (len(self.resident) - 1)

    def use(self, queue: str) -> None:
        """Marks the adapter of a queue as running, and therefore as resident."""
        self.used.add(queue)
        self.resident.add(queue)
        self._evict()

    def _evict(self) -> None:
        for queue in self._by_age:
            if self.num_empty >= 0:
                return
            if queue not in self.used:
                self.resident.discard(queue)
