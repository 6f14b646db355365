"""RQ's own end of a worker: its birth, its commands and its death, on a Redis that may not serve now."""

import os
import time
from collections.abc import Callable
from typing import Any

import redis
from redis.client import PubSub, PubSubWorkerThread
from rq.defaults import DEFAULT_LOGGING_DATE_FORMAT, DEFAULT_LOGGING_FORMAT
from rq.logutils import setup_loghandlers
from rq.serializers import JSONSerializer
from rq.worker import BaseWorker
from rq.worker.base import WorkerStatus

from shared.logs import fields
from shared.queue.connections import is_passing, retry_briefly
from shared.queue.outages import Outages
from shared.queue.refusals import NamingRedis, explain
from worker.serving.patience import Patience, call_until

FAREWELL_S = 4.0


class RqWorker(BaseWorker):
    """RQ's worker, which waits where RQ's own would end: a loaded model is not thrown away for a `BUSY`."""

    farewell_s = FAREWELL_S
    """How long its end may wait for Redis, all in all: a lease, after which others know of it anyway."""

    def __init__(self, *args: Any, connection: redis.Redis, **kwargs: Any) -> None:
        kwargs["connection"] = NamingRedis(connection_pool=connection.connection_pool)
        super().__init__(*args, **(kwargs | {"serializer": JSONSerializer}))
        retry_briefly(self.connection)
        self._outages = Outages(self.log)
        self._patience = Patience(self._outages)
        self._failure: BaseException | None = None
        self._farewell_until: float | None = None

    def bootstrap(
        self,
        logging_level: str | None = "INFO",
        date_format: str = DEFAULT_LOGGING_DATE_FORMAT,
        log_format: str = DEFAULT_LOGGING_FORMAT,
    ) -> None:
        """RQ's steps, each of which may be repeated."""
        for name in ("rq.worker", "rq.job"):
            setup_loghandlers(logging_level, date_format, log_format, name=name)
        self._patience.call(self.register_birth)
        self.log.info("Worker %s: started with PID %d", self.name, os.getpid())
        self._patience.call(self.subscribe)
        self._patience.call(lambda: self.set_state(WorkerStatus.STARTED))

    def register_birth(self) -> None:
        """Also where an earlier try was carried out, but its reply was lost."""
        if self.birth_date is not None:
            # RQ would take what it wrote then for another worker of the same name.
            self.connection.delete(self.key)
        super().register_birth()  # type: ignore[no-untyped-call]

    def teardown(self) -> None:
        """Tells RQ that this worker ends; a Redis that does not serve for so long is left alone."""
        try:
            call_until(self.last_words_until(), self.register_death)
            self.unsubscribe()  # type: ignore[no-untyped-call]
        except redis.RedisError as error:
            self.log.warning(
                "Worker %s: its end was not recorded: %s", self.name, explain(error), extra=fields("teardown")
            )

    def last_words_until(self) -> float:
        """When (`time.monotonic()`) an end gives up that begins with the first call."""
        if self._farewell_until is None:
            self._farewell_until = time.monotonic() + self.farewell_s
        return self._farewell_until

    def guard(self, run: Callable[[], None]) -> None:
        """Runs a thread whose failure ends the worker: without it the other threads would serve nobody."""
        try:
            run()
        except BaseException as error:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Ends the worker for an error in one of its threads."""
        if isinstance(error, redis.RedisError):
            self.log.error("Worker %s: %s", self.name, explain(error))
        else:
            self.log.error("Worker %s: a thread failed", self.name, exc_info=error)
        self._failure = error

    def _pubsub_exception_handler(
        self, exc: Exception, pubsub: PubSub, pubsub_thread: PubSubWorkerThread
    ) -> None:
        if not isinstance(exc, redis.RedisError):
            super()._pubsub_exception_handler(exc, pubsub, pubsub_thread)
        elif is_passing(exc):
            self._patience.call(lambda: self.connection.exists(self.key), part="commands")
            if pubsub.connection is not None:
                # The subscription may be what was refused: the next connection subscribes anew.
                pubsub.connection.disconnect()
        else:
            self.fail(exc)
            pubsub_thread.stop()
