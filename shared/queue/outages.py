"""The log lines about a Redis that does not serve: one at the beginning, one at the end."""

import logging
import threading
import time
from collections.abc import Callable

import redis

from shared.logs import fields
from shared.queue.not_now import reply_of


class Outages:
    """Keeps which parts of a process wait for Redis; any thread may call it."""

    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger = logger
        self._clock = clock
        self._lock = threading.Lock()
        self._parts: set[str] = set()
        self._began_at = 0.0

    def begin(self, part: str, error: BaseException) -> None:
        """A part met a failure that passes; logged if no other part waits already."""
        with self._lock:
            if not self._parts:
                self._began_at = self._clock()
                reason = reply_of(error) if isinstance(error, redis.RedisError) else repr(error)
                self._logger.warning("Redis does not serve, waiting: %s", reason, extra=fields("redis_lost"))
            self._parts.add(part)

    def end(self, part: str) -> None:
        """A part was served; logged if it was the last one that waited."""
        # Asked after every turn of every thread, which mostly has not waited.
        if part not in self._parts:
            return
        with self._lock:
            self._parts.discard(part)
            if not self._parts:
                outage_s = self._clock() - self._began_at
                self._logger.info("Redis is back after %.1f s", outage_s, extra=fields("redis_back"))
