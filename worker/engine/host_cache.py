"""An LRU cache of adapters in host memory, limited by their total number of bytes."""

from collections import OrderedDict
from typing import Generic, Protocol, TypeVar


class Weights(Protocol):
    """An adapter's weights in host memory, ready to be copied into a slot."""

    @property
    def num_bytes(self) -> int: ...


W = TypeVar("W", bound=Weights)


class HostCache(Generic[W]):
    """Adapters in host memory, by name; the least recently used adapters are evicted first."""

    def __init__(self, max_num_bytes: int) -> None:
        self.max_num_bytes = max_num_bytes
        self.num_bytes = 0
        self._weights: OrderedDict[str, W] = OrderedDict()
        self.names: frozenset[str] = frozenset()
        """The names of the cached adapters. Safe to read from any thread."""

    @property
    def contents(self) -> dict[str, W]:
        """The cached adapters by name, least recently used first."""
        return dict(self._weights)

    def has_room(self, num_bytes: int) -> bool:
        """True if an adapter of this size fits without an eviction."""
        return self.num_bytes + num_bytes <= self.max_num_bytes

    def get(self, name: str) -> W | None:
        """Returns a cached adapter and marks it as used now; returns None if it is not cached."""
        if name in self._weights:
            self._weights.move_to_end(name)
        return self._weights.get(name)

    def add(self, name: str, weights: W) -> None:
        """Caches an adapter, in place of earlier weights of this name; evicts other adapters if needed.

        An adapter that is larger than the whole cache is not cached.
        """
        self.remove(name)
        if weights.num_bytes > self.max_num_bytes:
            return
        self._weights[name] = weights
        self.num_bytes += weights.num_bytes
        while self.num_bytes > self.max_num_bytes:
            _, evicted = self._weights.popitem(last=False)
            self.num_bytes -= evicted.num_bytes
        self.names = frozenset(self._weights)

    def remove(self, name: str) -> None:
        """Removes an adapter; does nothing if it is not cached."""
        if name in self._weights:
            self.num_bytes -= self._weights.pop(name).num_bytes
            self.names = frozenset(self._weights)
