"""Start-time fair queueing, which divides capacity among names (adapters, tenants) over time."""

from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
MAX_NUM_NAMES = 4096


class Shares(Generic[K]):
    """The virtual start time of each name; the waiting name with the earliest start time is served next.

    Each time a name is served, its start time grows by the cost divided by the weight. A name that is new or
    was idle starts at the current virtual time, so that idle time earns no credit. While requests of two
    names wait, neither name gets ahead of the other by more than the cost of one request of each (Goyal, Vin,
    Cheng 1996).
    """

    def __init__(self) -> None:
        self._now = 0.0
        """The current virtual time: the start time of the name that was served last."""
        self._ends: dict[K, float] = {}
        """Virtual end time of each name's last request; names whose end time has passed may be missing."""

    def __len__(self) -> int:
        return len(self._ends)

    def start(self, name: K) -> float:
        """Returns the virtual start time of a name's next request."""
        return max(self._now, self._ends.get(name, 0.0))

    def charge(self, name: K, cost: float) -> None:
        """Charges a name that was served. `cost` is the number of sequences divided by the name's weight."""
        start = self.start(name)
        self._now = start
        self._ends[name] = start + cost
        if len(self._ends) > MAX_NUM_NAMES:
            self._forget()

    def _forget(self) -> None:
        """Drops names whose end time has passed.

        If too many names remain, keeps the half with the latest ends.
        """
        ahead = {name: end for name, end in self._ends.items() if end > self._now}
        if len(ahead) > MAX_NUM_NAMES // 2:
            by_end = sorted(ahead, key=lambda name: ahead[name], reverse=True)
            ahead = {name: ahead[name] for name in by_end[: MAX_NUM_NAMES // 2]}
        self._ends = ahead
