"""Retries while Redis is away or says "not now", for threads that have nothing else to do meanwhile."""

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
    """Repeats calls while Redis does not answer, until the worker is told to end."""

    def __init__(self, outages: Outages) -> None:
        self._outages = outages
        self._has_end = threading.Event()

    def end(self) -> None:
        """Ends all waiting: the worker was told to end."""
        self._has_end.set()

    def call(
        self,
        call: Callable[[], T],
        part: str = "worker",
        waits_for: Callable[[redis.RedisError], bool] = is_transient,
    ) -> T:
        """Repeats a call until it succeeds, and returns its result.

        Raises:
            redis.RedisError: the call failed, and `waits_for` is false for its error.
            SystemExit: the worker was told to end while it waited.
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
    """Repeats a call until it succeeds, and returns its result. For a worker that ends.

    Raises:
        redis.RedisError: the call failed with an error that a retry can't mend, or it still failed when
            `time.monotonic()` passed `give_up_at`.
    """
    while True:
        try:
            return call()
        except redis.RedisError as error:
            if not is_transient(error) or time.monotonic() >= give_up_at:
                raise
            time.sleep(RETRY_WAIT_S)


class PatientRedis(NamingRedis):
    """The client for `rq worker --connection-class`: it waits while the server says "not now".

    `rq` asks the server whether queues are suspended before it creates the worker, and ends if that fails. If
    the server refuses for good, this client ends the process with one line.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.set_retry(_PatientRetry(self.connection_pool))


class _PatientRetry(Retry):
    """Repeats commands while the server says "not now", and three times after a lost connection."""

    def __init__(self, pool: redis.ConnectionPool) -> None:
        super().__init__(ExponentialBackoff(cap=0.5, base=0.05), 3)
        self._pool = pool

    def __deepcopy__(self, memo: object) -> Self:
        """redis-py copies it for each connection, but pools can't be copied."""
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
