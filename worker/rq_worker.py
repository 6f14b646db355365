"""RQ's part of a worker (registration, commands, deregistration), which waits while Redis is down."""

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
    """RQ's worker class, changed to retry transient errors of Redis (such as BUSY).

    At such an error, RQ's own class would end the process, and the loaded model would be lost.
    """

    shutdown_wait_s = SHUTDOWN_WAIT_S
    """Maximum wait for Redis while the worker ends: one lease, after which other workers take over anyway."""

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
        """Registers the worker as RQ does, but retries each step until Redis answers."""
        for name in ("rq.worker", "rq.job"):
            setup_loghandlers(logging_level, date_format, log_format, name=name)
        self._patience.call(self.register_birth)
        self.log.info("Worker %s: started with PID %d", self.name, os.getpid())
        self._patience.call(self.subscribe)
        self._patience.call(lambda: self.set_state(WorkerStatus.STARTED))

    def register_birth(self) -> None:
        """Registers this worker; may be called again after a lost reply."""
        if self.birth_date is not None:
            # If the record of the first try stayed, RQ would take it for another worker's record.
            self.connection.delete(self.key)
        super().register_birth()  # type: ignore[no-untyped-call]

    def teardown(self) -> None:
        """Records in Redis that this worker has ended; retries for `shutdown_wait_s` at most."""
        try:
            call_until(self.shutdown_deadline(), self.register_death)
            self.unsubscribe()  # type: ignore[no-untyped-call]
        except redis.RedisError as error:
            self.log.warning(
                "Worker %s: its end was not recorded: %s", self.name, explain(error), extra=fields("teardown")
            )

    def shutdown_deadline(self) -> float:
        """Returns the time (`time.monotonic()`) until which calls to Redis may be retried during shutdown.

        The first call sets this time.
        """
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
                # If Redis refused the subscription itself, only a new connection subscribes again.
                pubsub.connection.disconnect()
        else:
            self.failure.report(exc)
            pubsub_thread.stop()
