"""Retries calls while Redis is down or reports transient errors; only for threads that may block."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Self, TypeVar

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from shared.queue.connections import is_transient
from shared.queue.not_now import ERR, code_of, is_transient_reply
from shared.queue.outages import Outages
from shared.queue.permissions import WORKER, describe, missing_rules
from shared.queue.refusals import NamingRedis, explain

logger = logging.getLogger("rq.worker")

T = TypeVar("T")
RETRY_WAIT_S = 0.5


class Patience:
    """Retries calls to Redis after transient errors, until the worker is told to end."""

    def __init__(self, outages: Outages) -> None:
        self._outages = outages
        self._has_end = threading.Event()

    def end(self) -> None:
        """Ends all waits between retries, because the worker was told to end."""
        self._has_end.set()

    def call(
        self,
        call: Callable[[], T],
        part: str = "worker",
        waits_for: Callable[[redis.RedisError], bool] = is_transient,
    ) -> T:
        """Retries a call until it succeeds, and returns its result.

        Raises:
            redis.RedisError: the call failed with an error for which `waits_for` is false.
            SystemExit: the worker was told to end between two tries.
        """
        while True:
            try:
                result = call()
            except redis.RedisError as error:
                if not waits_for(error):
                    raise
                self._outages.begin(part, error)
                if self._has_end.wait(RETRY_WAIT_S):
                    raise SystemExit(0) from error
            else:
                self._outages.end(part)
                return result


def call_until(give_up_at: float, call: Callable[[], T]) -> T:
    """Retries a call until it succeeds, and returns its result; used in the shutdown of a worker.

    Raises:
        redis.RedisError: the error is not transient, or `time.monotonic()` has passed `give_up_at`.
    """
    while True:
        try:
            return call()
        except redis.RedisError as error:
            if not is_transient(error) or time.monotonic() >= give_up_at:
                raise
            time.sleep(RETRY_WAIT_S)


class PatientRedis(NamingRedis):
    """A client for `rq worker --connection-class` that retries after transient errors of Redis, such as BUSY.

    Before `rq` creates the worker, it asks Redis whether queues are suspended, and ends if this call fails.
    After an error that is not transient, this client ends the process with one log line.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.set_retry(_PatientRetry(self.connection_pool))


class _PatientRetry(Retry):
    """Retries commands while Redis reports a transient error, and three times after a lost connection."""

    def __init__(self, pool: redis.ConnectionPool) -> None:
        super().__init__(ExponentialBackoff(cap=0.5, base=0.05), 3)
        self._pool = pool

    def __deepcopy__(self, memo: object) -> Self:
        """Returns this object itself: redis-py copies it for each connection, but can't copy `_pool`."""
        return self

    def call_with_retry(self, do: Callable[[], T], *args: Any, **kwargs: Any) -> T:
        outages = Outages(logger)
        while True:
            try:
                result = super().call_with_retry(do, *args, **kwargs)
            except redis.RedisError as error:
                if not is_transient_reply(error):
                    self._end_if_refused(error)
                    raise
                outages.begin("start", error)
                time.sleep(RETRY_WAIT_S)
            else:
                outages.end("start")
                return result

    def _end_if_refused(self, error: redis.RedisError) -> None:
        if code_of(error) == "NOPERM":
            rules = missing_rules(self._pool, WORKER)
            logger.error("%s", describe(rules, self._pool.connection_kwargs.get("username")))
            raise SystemExit(2) from error
        if code_of(error) != ERR:
            logger.error("%s", explain(error))
            raise SystemExit(2) from error
