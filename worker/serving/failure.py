"""Reports the failure of any thread to the engine loop, which then ends the worker."""

import logging
from collections.abc import Callable

import redis

from shared.queue.refusals import explain

logger = logging.getLogger("rq.worker")


class Failure:
    """The error that ends a worker: the first one that any of its threads reports."""

    def __init__(self, worker_name: str) -> None:
        self._worker_name = worker_name
        self.error: BaseException | None = None

    @property
    def is_crash(self) -> bool:
        """True if the error counts as a crash, since a request may have caused it; False for Redis errors."""
        return self.error is not None and not isinstance(self.error, redis.RedisError)

    def report(self, error: BaseException) -> None:
        """Logs an error, and keeps the first one. The engine loop then ends after its current step."""
        if isinstance(error, redis.RedisError):
            logger.error("Worker %s: %s", self._worker_name, explain(error))
        else:
            logger.error("Worker %s: a thread failed", self._worker_name, exc_info=error)
        self.error = self.error or error

    def guard(self, run: Callable[[], None]) -> None:
        """Runs the function of a thread, and reports its error, because the worker needs every thread."""
        try:
            run()
        except BaseException as error:
            self.report(error)
