"""The failure of a thread, which ends the whole worker."""

import logging
from collections.abc import Callable

import redis

from shared.queue.refusals import explain

logger = logging.getLogger("rq.worker")


class Failure:
    """The first error that ends a worker, reported from any of its threads."""

    def __init__(self, worker_name: str) -> None:
        self._worker_name = worker_name
        self.error: BaseException | None = None

    @property
    def is_crash(self) -> bool:
        """True if a request may have caused the error, which no reply of Redis is."""
        return self.error is not None and not isinstance(self.error, redis.RedisError)

    def report(self, error: BaseException) -> None:
        """Logs and keeps an error; the engine loop ends the worker after its current step."""
        if isinstance(error, redis.RedisError):
            logger.error("Worker %s: %s", self._worker_name, explain(error))
        else:
            logger.error("Worker %s: a thread failed", self._worker_name, exc_info=error)
        self.error = self.error or error

    def guard(self, run: Callable[[], None]) -> None:
        """Runs the function of a thread and reports its error; the other threads can't serve without it."""
        try:
            run()
        except BaseException as error:
            self.report(error)
