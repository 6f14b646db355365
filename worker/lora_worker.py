"""The worker class for `rq worker -w`: an RQ worker that runs many requests in one batch."""

import contextlib
import faulthandler
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import redis
from rq.command import parse_payload
from rq.defaults import RQ_KEY_PREFIX
from rq.logutils import setup_loghandlers
from rq.queue import Queue
from rq.serializers import JSONSerializer
from rq.worker.base import DequeueStrategy, WorkerStatus

from shared.errors import ConfigurationError, LorelayError
from shared.logs import fields
from shared.model_cards import ModelCard, WorkerFacts
from shared.queue import keys, permissions, registry
from shared.queue.connections import SOCKET_TIMEOUT_S, check_server, connect_like, same_server
from shared.queue.fleet import describe_differences
from shared.queue.not_now import is_transient_reply
from shared.queue.refusals import explain
from shared.queue.scripts import mend
from shared.queue.worker_streams import WorkerStreams
from shared.settings import ENV_PREFIX, WorkerSettings
from worker.engine.ports import Engine, Model
from worker.model.kernels.onednn import bound_caches
from worker.model.kernels.threads import sleep_while_waiting, stays_eager
from worker.rq_worker import RqWorker
from worker.serving.faults import Faults
from worker.serving.served import ALL_QUEUES, ServedQueues, queues_of, worker_facts
from worker.serving.service import WorkerService, build_engine


class LoraWorker(RqWorker):
    """Serves the queues of one base model and its adapters, configured by `LORELAY_*` variables.

    The queue arguments of `rq worker` are model names. Without arguments, the base and all adapters are
    served. Only `work` imports torch, because RQ imports this class even to parse its command line.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._service: WorkerService | None = None
        self._stop_asked = False
        self._follower = registry.WorkerFollower(self.name)
        self._has_all_queues = True
        self._model_names: list[str] = []

    def work(
        self,
        burst: bool = False,
        logging_level: str | None = None,
        date_format: str = "%H:%M:%S",
        log_format: str = "%(asctime)s %(message)s",
        max_jobs: int | None = None,
        max_idle_time: int | None = None,
        with_scheduler: bool = False,
        dequeue_strategy: DequeueStrategy = DequeueStrategy.DEFAULT,
    ) -> bool:
        """Loads the model, then serves until SIGTERM (or, with `burst`, until the queues are empty).

        Raises:
            SystemExit: a configuration error (exit code 2), or any other error (1).
        """
        _refuse_options(max_jobs=max_jobs, max_idle_time=max_idle_time, with_scheduler=with_scheduler)
        _log_to_streams(logging_level or "INFO", date_format, log_format)
        self._install_signal_handlers()
        if sys.__stderr__ is not None:
            faulthandler.enable(sys.__stderr__)  # or a crash in native code would leave no line
        try:
            settings = self._prepare()
            level = logging_level or settings.log_level
            _log_to_streams(level, date_format, log_format)
            self._patience.call(lambda: mend(self.connection, self._rq_keys()))
            self.bootstrap(level, date_format, log_format)
            self._patience.call(lambda: registry.begin_loading(self.connection, self._model_names, self.name))
            return self._work(settings, burst)
        except LorelayError as error:
            self.log.error("%s", error.message)
            raise SystemExit(2) from error
        except redis.RedisError as error:
            self.log.error("Worker %s: %s", self.name, explain(error))
            raise SystemExit(1) from error
        finally:
            # A worker without a birth date did not register, because another worker has its name. Teardown
            # would delete the record of that other worker.
            if self.birth_date is not None:
                self.teardown()

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        """Handles SIGTERM and SIGINT: the first signal drains the worker, the second hands back all requests.

        Raises:
            SystemExit: the model is still being loaded.
        """
        self._patience.end()
        if self._service is None:
            self._stop_asked = True
            raise SystemExit(0)
        if not self._service.is_draining:
            self.log.info("Worker %s: draining", self.name, extra=fields("drain"))
        self._service.drain()

    def _rq_keys(self) -> dict[str, str]:
        """Returns the types of the Redis keys that RQ writes when a worker registers."""
        sets = [f"{RQ_KEY_PREFIX}:workers:{name}" for name in self.queue_names()]
        return {self.key: "hash", **dict.fromkeys([f"{RQ_KEY_PREFIX}:workers", *sets], "set")}

    def _prepare(self) -> WorkerSettings:
        """Checks server and settings, and sets the queues for which this worker registers."""
        # Only transient replies are retried: if nothing answers at the URL, the URL is probably wrong.
        self._patience.call(self._check_server, waits_for=is_transient_reply)
        url = os.environ.get(f"{ENV_PREFIX}REDIS_URL")
        if url and not same_server(url, self.connection):
            raise ConfigurationError(
                f"{ENV_PREFIX}REDIS_URL and rq worker's -u name different servers: start with -u and that URL"
            )
        settings = WorkerSettings.load()
        self._has_all_queues = self.queue_names() == [ALL_QUEUES]
        adapter_names = [source.name for source in settings.adapters]
        self._model_names = (
            [settings.base_name, *adapter_names] if self._has_all_queues else self.queue_names()
        )
        self.queues = [
            Queue(name, connection=self.connection, serializer=JSONSerializer)
            for name in queues_of(settings.base_name, adapter_names, self.queue_names())
        ]
        self._ordered_queues = self.queues[:]
        return settings

    def _check_server(self) -> None:
        permissions.check(self.connection, permissions.WORKER)
        check_server(self.connection)

    def load_engine(self, settings: WorkerSettings, faults: Faults) -> Engine:
        """Creates the engine. Only this method chooses which `Engine` the worker runs."""
        return build_engine(self.load_model(settings), settings, faults)

    def load_model(self, settings: WorkerSettings) -> Model:
        """Loads the model and its adapters. torch is imported here; subclasses may override this method."""
        sleep_while_waiting(is_eager=stays_eager(settings.compile))
        bound_caches()
        from worker.model.startup import load_model_runner

        runner = load_model_runner(settings)
        runner.watch.start()
        return runner

    def _work(self, settings: WorkerSettings, burst: bool) -> bool:
        self.shutdown_wait_s = settings.lease_s
        faults = Faults(settings.faults)
        with contextlib.closing(self.load_engine(settings, faults)) as engine:
            only = None if self._has_all_queues else self.queue_names()
            queues = ServedQueues(engine.served, engine.max_model_len, only)
            self._service = service = WorkerService(
                engine,
                queues,
                settings,
                name=self.name,
                faults=faults,
                make_streams=lambda: self._streams(settings),
                on_beat=lambda: self._beat(queues.cards(), worker_facts(engine), engine.forward_state),
            )
            service.report_outages_to(self._outages)
            if self._stop_asked:
                # SIGTERM came while the model was loaded, and its SystemExit was raised inside a __del__,
                # where Python ignores exceptions.
                service.drain()
            self._announce(service, queues, worker_facts(engine))
            service.run(self.failure, self.shutdown_deadline, burst=burst)
            if self.failure.error is not None:
                raise SystemExit(1) from self.failure.error
            self.log.info("Worker %s: ended with %s", self.name, service.remains)
            return service.num_claimed > 0

    def _announce(self, service: WorkerService, queues: ServedQueues, facts: WorkerFacts) -> None:
        """Takes the worker's lease, then registers the models, so that each model has a live worker."""
        self._patience.call(service.take_lease)
        self._patience.call(lambda: registry.register(self.connection, queues.cards()))
        self._patience.call(lambda: registry.end_loading(self.connection, self._model_names))
        cards = queues.cards()
        peers = self._patience.call(lambda: registry.follow_workers(self.connection, cards, self.name, facts))
        for difference in describe_differences(peers, self.name, facts):
            self.log.warning("Worker %s: %s", self.name, difference, extra=fields("workers_differ"))
        self._patience.call(lambda: self.set_state(WorkerStatus.IDLE))
        self.log.info("Worker %s: serving %s", self.name, ", ".join(self.queue_names()))

    def handle_payload(self, message: Any) -> None:
        """Handles a command that RQ published; `stop-job` and `stop-execution` end one running request."""
        try:
            payload = parse_payload(message)
            if payload["command"] not in ("stop-job", "stop-execution"):
                super().handle_payload(message)  # type: ignore[no-untyped-call]
            elif self._service is not None:
                self._service.stop_request(str(payload["job_id"]))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            # If the error were raised, it would end RQ's thread, and later commands would have no effect.
            self.log.error("Worker %s: a command can't be read: %r", self.name, error)

    def _beat(self, cards: Sequence[ModelCard], facts: WorkerFacts, forward_state: str) -> None:
        """Sends RQ's heartbeat, which `rq info` shows.

        If Redis has lost its data, registers the worker again.
        """
        with connect_like(self.connection, socket_timeout_s=SOCKET_TIMEOUT_S) as connection:
            mend(connection, {self.key: "hash"})
            is_forgotten = not connection.exists(self.key)
            if is_forgotten:
                self.log.warning("Worker %s: Redis lost this worker's record, registering again", self.name)
                self.register_birth()
            registry.repair(connection, cards, fill=is_forgotten)
            self._follower.follow(connection, cards, facts, is_forced=is_forgotten)
            with connection.pipeline() as pipeline:
                self.heartbeat(pipeline=pipeline)
                described = {keys.FORWARD_FIELD: forward_state, keys.FACTS_FIELD: facts.encode()}
                pipeline.hset(self.key, mapping=described)
                pipeline.execute()

    def _streams(self, settings: WorkerSettings) -> WorkerStreams:
        """Creates `WorkerStreams` with a new connection, so that no thread blocks another thread."""
        return WorkerStreams(
            connect_like(self.connection, socket_timeout_s=SOCKET_TIMEOUT_S),
            base=settings.base_name,
            worker_name=self.name,
            lease_s=settings.lease_s,
            stream_ttl_s=settings.stream_ttl_s,
            result_ttl_s=settings.result_ttl_s,
            failure_ttl_s=settings.failure_ttl_s,
        )

    def _install_signal_handlers(self) -> None:
        signal.signal(signal.SIGINT, self.request_stop)
        signal.signal(signal.SIGTERM, self.request_stop)


def _log_to_streams(level: str, date_format: str, log_format: str) -> None:
    """Adds RQ's log handlers to the loggers that have none, and sets the level of all these loggers."""
    for package in ("rq.worker", "worker", "shared"):
        setup_loghandlers(level, date_format, log_format, package)


def _refuse_options(**options: Any) -> None:
    for name, value in options.items():
        if value:
            raise SystemExit(f"LoraWorker does not take --{name.replace('_', '-')}")
