"""RQ's side of a worker (registration, commands, deregistration), which waits while Redis is away."""

import os
import time
from typing import Any

import redis
from redis.client import PubSub, PubSubWorkerThread
from rq.defaults import DEFAULT_LOGGING_DATE_FORMAT, DEFAULT_LOGGING_FORMAT
from rq.logutils import setup_loghandlers
from rq.serializers import JSONSerializer
from rq.worker import BaseWorker
from rq.worker.base import WorkerStatus

from shared.logs import fields
from shared.queue.connections import is_transient, retry_briefly
from shared.queue.outages import Outages
from shared.queue.refusals import NamingRedis, explain
from worker.serving.failure import Failure
from worker.serving.patience import Patience, call_until

SHUTDOWN_WAIT_S = 4.0


class RqWorker(BaseWorker):
    """RQ's worker, but it waits where RQ's own ends: a `BUSY` must not cost a loaded model."""

    shutdown_wait_s = SHUTDOWN_WAIT_S
    """Longest wait for Redis while the worker ends: one lease, after which others take over anyway."""

    def __init__(self, *args: Any, connection: redis.Redis, **kwargs: Any) -> None:
        kwargs["connection"] = NamingRedis(connection_pool=connection.connection_pool)
        super().__init__(*args, **(kwargs | {"serializer": JSONSerializer}))
        retry_briefly(self.connection)
        self._outages = Outages(self.log)
        self._patience = Patience(self._outages)
        self.failure = Failure(self.name)
        self._shutdown_deadline: float | None = None

    def bootstrap(
        self,
        logging_level: str | None = "INFO",
        date_format: str = DEFAULT_LOGGING_DATE_FORMAT,
        log_format: str = DEFAULT_LOGGING_FORMAT,
    ) -> None:
        """Registers the worker as RQ does, but repeats each step until Redis answers."""
        for name in ("rq.worker", "rq.job"):
            setup_loghandlers(logging_level, date_format, log_format, name=name)
        self._patience.call(self.register_birth)
        self.log.info("Worker %s: started with PID %d", self.name, os.getpid())
        self._patience.call(self.subscribe)
        self._patience.call(lambda: self.set_state(WorkerStatus.STARTED))

    def register_birth(self) -> None:
        """Registers this worker, also after an earlier try whose reply was lost."""
        if self.birth_date is not None:
            # RQ would take the record of the earlier try for another worker of the same name, and refuse.
            self.connection.delete(self.key)
        super().register_birth()  # type: ignore[no-untyped-call]

    def teardown(self) -> None:
        """Tells RQ that this worker ends; gives up if Redis does not answer within `shutdown_wait_s`."""
        try:
            call_until(self.shutdown_deadline(), self.register_death)
            self.unsubscribe()  # type: ignore[no-untyped-call]
        except redis.RedisError as error:
            self.log.warning(
                "Worker %s: its end was not recorded: %s", self.name, explain(error), extra=fields("teardown")
            )

    def shutdown_deadline(self) -> float:
        """The deadline (`time.monotonic()`) of calls to Redis while the worker ends; set by the first one."""
        if self._shutdown_deadline is None:
            self._shutdown_deadline = time.monotonic() + self.shutdown_wait_s
        return self._shutdown_deadline

    def _pubsub_exception_handler(
        self, exc: Exception, pubsub: PubSub, pubsub_thread: PubSubWorkerThread
    ) -> None:
        if not isinstance(exc, redis.RedisError):
            super()._pubsub_exception_handler(exc, pubsub, pubsub_thread)
        elif is_transient(exc):
            self._patience.call(lambda: self.connection.exists(self.key), part="commands")
            if pubsub.connection is not None:
                # Redis may have refused the subscription itself: the next connection subscribes again.
                pubsub.connection.disconnect()
        else:
            self.failure.report(exc)
            pubsub_thread.stop()
