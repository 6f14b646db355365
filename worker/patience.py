"""Waiting for a Redis that does not serve now, in the threads that have nothing else to do."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from shared.connections import is_passing
from shared.not_now import is_not_now
from shared.outages import Outages
from shared.refusals import NamingRedis

T = TypeVar("T")
RETRY_WAIT_S = 0.5


class Patience:
    """Repeats calls while Redis does not serve, until the worker is told to end."""

    def __init__(self, outages: Outages) -> None:
        self._outages = outages
        self._has_end = threading.Event()

    def end(self) -> None:
        """The worker is to end: whoever waits gives up."""
        self._has_end.set()

    def call(
        self,
        call: Callable[[], T],
        part: str = "worker",
        waits_for: Callable[[redis.RedisError], bool] = is_passing,
    ) -> T:
        """The result of a call that may be repeated.

        Raises:
            redis.RedisError: it failed with an error that is not waited for.
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
    """The result of a call that may be repeated, from a worker that ends.

    Raises:
        redis.RedisError: it failed with an error that does not pass, or until `time.monotonic()` passed
            `give_up_at`.
    """
    while True:
        try:
            return call()
        except redis.RedisError as error:
            if not is_passing(error) or time.monotonic() >= give_up_at:
                raise
            time.sleep(RETRY_WAIT_S)


class PatientRedis(NamingRedis):
    """The client for `rq worker --connection-class`: it waits while the server says "not now".

    `rq` asks the server whether queues are suspended before it makes the worker, and ends if that fails.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.set_retry(_PatientRetry(ExponentialBackoff(cap=0.5, base=0.05), 3))


class _PatientRetry(Retry):
    """Repeats what failed with a reply that passes, however often; a lost connection as often as told."""

    def call_with_retry(self, do: Callable[[], T], *args: Any, **kwargs: Any) -> T:
        outages = Outages(logging.getLogger("rq.worker"))
        while True:
            try:
                result = super().call_with_retry(do, *args, **kwargs)
            except redis.RedisError as error:
                if not is_not_now(error):
                    raise
                outages.begin("start", error)
                time.sleep(RETRY_WAIT_S)
            else:
                outages.end("start")
                return result
