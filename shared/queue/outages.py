"""Logs an outage of Redis with one line at its beginning and one at its end."""

import logging
import threading
import time
from collections.abc import Callable

import redis

from shared.logs import fields
from shared.queue.not_now import reply_of


class Outages:
    """Tracks which parts of a process are waiting for Redis; thread-safe."""

    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger = logger
        self._clock = clock
        self._lock = threading.Lock()
        self._parts: set[str] = set()
        self._began_at = 0.0

    def begin(self, part: str, error: BaseException) -> None:
        """Records that a part waits for Redis; logs the outage if this is the only waiting part."""
        with self._lock:
            if not self._parts:
                self._began_at = self._clock()
                reason = reply_of(error) if isinstance(error, redis.RedisError) else repr(error)
                self._logger.warning(
                    "Redis is not available, waiting: %s", reason, extra=fields("redis_lost")
                )
            self._parts.add(part)

    def end(self, part: str) -> None:
        """Records that Redis answered a part; logs the end of the outage once no part waits."""
        # Checked without the lock, because every turn of every thread calls this, mostly without an outage.
        if part not in self._parts:
            return
        with self._lock:
            self._parts.discard(part)
            if not self._parts:
                outage_s = self._clock() - self._began_at
                self._logger.info("Redis is back after %.1f s", outage_s, extra=fields("redis_back"))
