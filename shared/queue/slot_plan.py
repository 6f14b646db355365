"""A forecast of a worker's adapter slots: their state after the requests chosen so far."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class AdapterSlots(NamedTuple):
    """The slots of a worker's device now."""

    num: int
    resident: Sequence[str]
    """Queues whose adapters have a slot, in use or not, least recently used first."""


class SlotPlan:
    """The running and the resident adapters after each choice; evicts the LRU, as `AdapterCache` will."""

    def __init__(self, base: str, running: Mapping[str, int], slots: AdapterSlots) -> None:
        """`base`: the queue of the base model, which needs no slot. `running`: sequences per queue."""
        self.used = {base, *(queue for queue, num_sequences in running.items() if num_sequences > 0)}
        """Queues whose adapters run; the base is always among them."""
        self.resident = self.used | set(slots.resident)
        self._num = slots.num
        self._by_age = slots.resident
        self._evict()

    @property
    def num_free(self) -> int:
        """Slots that no running adapter uses. Negative if more adapters run than there are slots."""
        return self._num - (len(self.used) - 1)

    @property
    def num_empty(self) -> int:
        """Slots without an adapter."""
        return self._num - (len(self.resident) - 1)

    def use(self, queue: str) -> None:
        """Makes the adapter of a queue running, and so resident."""
        self.used.add(queue)
        self.resident.add(queue)
        self._evict()

    def _evict(self) -> None:
        for queue in self._by_age:
            if self.num_empty >= 0:
                return
            if queue not in self.used:
                self.resident.discard(queue)
