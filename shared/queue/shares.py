"""Fair shares over time: start-time fair queueing, in sequences."""

from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
MAX_NUM_NAMES = 4096


class Shares(Generic[K]):
    """The virtual time at which each of many names has had its share; the earliest is served next.

    A name that is served moves ahead by its cost divided by its weight. A new name, or one that paused,
    begins at the current virtual time, so that nobody saves up a claim while idle. If two names both wait,
    neither gets ahead of the other by more than the cost of one request of each (Goyal, Vin, Cheng 1996).
    """

    def __init__(self) -> None:
        self._now = 0.0
        """The current virtual time: the start of the share that was served last."""
        self._ends: dict[K, float] = {}
        """The end of the last share of each name that is ahead of now."""

    def __len__(self) -> int:
        return len(self._ends)

    def start(self, name: K) -> float:
        """The virtual time at which the next share of a name begins."""
        return max(self._now, self._ends.get(name, 0.0))

    def charge(self, name: K, cost: float) -> None:
        """Charges a name that was served; `cost` is sequences divided by weight."""
        start = self.start(name)
        self._now = start
        self._ends[name] = start + cost
        if len(self._ends) > MAX_NUM_NAMES:
            self._forget()

    def _forget(self) -> None:
        """Drops the names that are not ahead of now, and if too many are, the half that is least ahead."""
        ahead = {name: end for name, end in self._ends.items() if end > self._now}
        if len(ahead) > MAX_NUM_NAMES // 2:
            by_end = sorted(ahead, key=lambda name: ahead[name], reverse=True)
            ahead = {name: ahead[name] for name in by_end[: MAX_NUM_NAMES // 2]}
        self._ends = ahead
