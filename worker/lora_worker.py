"""`rq worker -w worker.LoraWorker`: RQ's worker that holds many requests at once."""

import contextlib
import gc
import os
import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

import redis
from rq.command import parse_payload
from rq.defaults import RQ_KEY_PREFIX
from rq.logutils import setup_loghandlers
from rq.queue import Queue
from rq.serializers import JSONSerializer
from rq.worker.base import DequeueStrategy, WorkerStatus

from shared.errors import ConfigurationError, LorelayError
from shared.logs import fields
from shared.messages import ModelCard
from shared.queue import keys, permissions, registry
from shared.queue.connections import check_server, connect_like, same_server
from shared.queue.not_now import is_not_now
from shared.queue.refusals import explain
from shared.queue.scripts import mend
from shared.queue.worker_streams import WorkerStreams
from shared.settings import ENV_PREFIX, WorkerSettings
from worker.engine.block_manager import BlockManager
from worker.engine.engine import Engine
from worker.engine.scheduler import Scheduler
from worker.engine.step_pace import StepPace
from worker.model.kernels.onednn import bound_caches
from worker.model.kernels.threads import sleep_while_waiting, stays_eager
from worker.rq_worker import RqWorker
from worker.serving.consumer import IO, Consumer, HeldRequests
from worker.serving.engine_loop import EngineLoop
from worker.serving.faults import Faults, FaultyRunner
from worker.serving.heartbeat import Heartbeat
from worker.serving.served import adapter_slots, model_cards, served_queues, served_versions

if TYPE_CHECKING:
    from worker.model.model_runner import ModelRunner

SOCKET_TIMEOUT_S = 5.0
HUNG_EXIT_CODE = 70
HEARTBEAT = "heartbeat"


class LoraWorker(RqWorker):
    """Serves the queues of one base model and its adapters, configured by `LORELAY_*` variables.

    Queue arguments are model names; none means the base and all adapters. Heavy imports happen in `work`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._loop: EngineLoop | None = None
        self._consumer: Consumer | None = None
        self._stop_asked = False

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
            SystemExit: with a non-zero code after a configuration error or anything else abnormal.
        """
        _refuse_options(
            max_jobs=max_jobs,
            max_idle_time=max_idle_time,
            with_scheduler=with_scheduler,
        )
        _log_to_streams(logging_level or "INFO", date_format, log_format)
        self._install_signal_handlers()
        try:
            settings = self._prepare()
            level = logging_level or settings.log_level
            _log_to_streams(level, date_format, log_format)
            self._patience.call(lambda: mend(self.connection, self._rq_keys()))
            self.bootstrap(level, date_format, log_format)
            return self._work(settings, burst)
        except LorelayError as error:
            self.log.error("%s", error.message)
            raise SystemExit(2) from error
        except redis.RedisError as error:
            self.log.error("Worker %s: %s", self.name, explain(error))
            raise SystemExit(1) from error
        finally:
            # Else the name is that of another worker, which goes on.
            if self.birth_date is not None:
                self.teardown()

    def request_stop(self, signum: int, frame: FrameType | None) -> None:
        """SIGTERM and SIGINT: drain; the second one hands back at once. While loading: end."""
        self._patience.end()
        if self._loop is None:
            self._stop_asked = True
            raise SystemExit(0)
        if not self._loop.is_draining:
            self.log.info("Worker %s: draining", self.name, extra=fields("drain"))
        self._loop.drain()

    def _rq_keys(self) -> dict[str, str]:
        """The keys that RQ's registration writes to, with the type that each must have."""
        sets = [f"{RQ_KEY_PREFIX}:workers:{name}" for name in self.queue_names()]
        return {self.key: "hash", **dict.fromkeys([f"{RQ_KEY_PREFIX}:workers", *sets], "set")}

    def _prepare(self) -> WorkerSettings:
        """Settings, and the queues this worker registers for."""
        # A URL that leads nowhere is an error; a server that answers is waited for.
        self._patience.call(self._check_server, waits_for=is_not_now)
        url = os.environ.get(f"{ENV_PREFIX}REDIS_URL")
        if url and not same_server(url, self.connection):
            raise ConfigurationError(
                f"{ENV_PREFIX}REDIS_URL and rq worker's -u name different servers: start with -u and that URL"
            )
        settings = WorkerSettings.load()
        self.queues = [
            Queue(name, connection=self.connection, serializer=JSONSerializer)
            for name in served_queues(settings, self.queue_names())
        ]
        self._ordered_queues = self.queues[:]
        return settings

    def _check_server(self) -> None:
        permissions.check(self.connection, permissions.WORKER)
        check_server(self.connection)

    def _work(self, settings: WorkerSettings, burst: bool) -> bool:
        self.farewell_s = settings.lease_s
        with contextlib.closing(self._load_model_runner(settings)) as model_runner:
            return self._serve(model_runner, settings, burst)

    def _serve(self, model_runner: "ModelRunner", settings: WorkerSettings, burst: bool) -> bool:
        faults = Faults(settings.faults)
        # Libraries and model are here to stay: a collection that goes through them takes all streams 0.2 s.
        gc.collect()
        gc.freeze()
        engine = build_engine(model_runner, settings, faults)
        cards = model_cards(settings, model_runner)
        held = HeldRequests()
        consumer = Consumer(
            self._streams(settings),
            held,
            max_num_requests=settings.max_batch_size,
            poll_s=settings.poll_s,
            slots=lambda: adapter_slots(settings, model_runner.adapter_cache),
            faults=faults,
            encode=model_runner.tokenizer.encode_chat,
        )
        self._consumer = consumer
        model_runner.adapter_cache.on_read = consumer.wake_engine
        self._loop = loop = EngineLoop(
            engine, consumer, held, drain_s=settings.drain_s, step_delay_s=settings.step_delay_s
        )
        if self._stop_asked:
            # The exception that should have ended the loading was lost: Python ignores it in a __del__.
            loop.drain()
        heartbeat = Heartbeat(
            self._streams(settings),
            held,
            consumer,
            settings,
            served=served_versions(cards, self.queue_names()),
            on_beat=lambda: self._beat(cards, model_runner.forward_state),
            watch_engine=lambda: self._end_if_hung(loop.step_age_s(), settings.step_limit_s),
        )
        consumer.outages = heartbeat.outages = self._outages
        # First the lease, then the cards: a request for these weights finds a live worker that has them.
        self._patience.call(heartbeat.turn)
        self._patience.call(lambda: registry.register(self.connection, cards))
        self._patience.call(lambda: self.set_state(WorkerStatus.IDLE))
        self.log.info("Worker %s: serving %s", self.name, ", ".join(self.queue_names()))
        self._run(loop, consumer, heartbeat, settings, burst)
        self.log.info("Worker %s: ended with %s", self.name, engine.remains)
        return consumer.num_claimed > 0

    def _load_model_runner(self, settings: WorkerSettings) -> "ModelRunner":
        sleep_while_waiting(is_eager=stays_eager(settings.compile))
        bound_caches()
        from worker.model.model_runner import ModelRunner

        return ModelRunner.load(settings)

    def _run(
        self,
        loop: EngineLoop,
        consumer: Consumer,
        heartbeat: Heartbeat,
        settings: WorkerSettings,
        burst: bool,
    ) -> None:
        """Serves, then stops in order: engine, I/O, what is left back to the queues, heartbeat."""
        threads = {
            name: threading.Thread(target=self.guard, args=(run,), name=name, daemon=True)
            for name, run in {**consumer.threads, HEARTBEAT: heartbeat.run}.items()
        }
        for thread in threads.values():
            thread.start()
        has_crashed, num_handed_back = True, 0
        try:
            loop.run(lambda: self._failure is not None or (burst and consumer.is_idle))
            # A reply of Redis is no request's fault.
            has_crashed = not (self._failure is None or isinstance(self._failure, redis.RedisError))
        finally:
            consumer.stop()
            threads[IO].join()
            try:
                # After a crash it is left to be reaped, which counts it.
                if not has_crashed:
                    num_handed_back = consumer.hand_back(self.last_words_until())
            finally:
                heartbeat.stop()
                threads[HEARTBEAT].join()
        if num_handed_back:
            self.log.warning("Worker %s: handed %d requests back", self.name, num_handed_back)
        if self._failure is not None:
            raise SystemExit(1) from self._failure

    def handle_payload(self, message: Any) -> None:
        """RQ's commands; `stop-job` and `stop-execution` end one of many running requests."""
        try:
            payload = parse_payload(message)
            if payload["command"] not in ("stop-job", "stop-execution"):
                super().handle_payload(message)  # type: ignore[no-untyped-call]
            elif self._consumer is not None:
                self._consumer.stop_request(str(payload["job_id"]))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            # Raised, it would end RQ's thread, and with it all obedience to commands.
            self.log.error("Worker %s: a command can't be read: %r", self.name, error)

    def _beat(self, cards: Sequence[ModelCard], forward_state: str) -> None:
        """RQ's own heartbeat, for `rq info` and the dashboard. A Redis that came back empty is told anew."""
        with connect_like(self.connection, socket_timeout_s=SOCKET_TIMEOUT_S) as connection:
            mend(connection, {self.key: "hash"})
            is_forgotten = not connection.exists(self.key)
            if is_forgotten:
                self.log.warning("Worker %s: Redis forgot this worker, registering again", self.name)
                self.register_birth()
            registry.repair(connection, cards, fill=is_forgotten)
            with connection.pipeline() as pipeline:
                self.heartbeat(pipeline=pipeline)
                pipeline.hset(self.key, keys.FORWARD_FIELD, forward_state)
                pipeline.execute()

    def _end_if_hung(self, step_age_s: float, step_limit_s: float) -> None:
        """Ends the process, without clean-up: its engine hangs, and others take its requests over."""
        if step_age_s > step_limit_s:
            self.log.critical("Worker %s: a step takes over %g s, ending", self.name, step_limit_s)
            os._exit(HUNG_EXIT_CODE)

    def _streams(self, settings: WorkerSettings) -> WorkerStreams:
        """A stream end with a connection of its own: a thread that blocks on it blocks nobody else."""
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
    """Adds RQ's handlers where there are none yet; sets the level in any case."""
    for package in ("rq.worker", "worker", "shared"):
        setup_loghandlers(level, date_format, log_format, package)


def _refuse_options(**options: Any) -> None:
    for name, value in options.items():
        if value:
            raise SystemExit(f"LoraWorker does not take --{name.replace('_', '-')}")


def build_engine(model_runner: "ModelRunner", settings: WorkerSettings, faults: Faults) -> Engine:
    """The engine of a worker around what runs its batches."""
    blocks = BlockManager(
        model_runner.num_blocks, model_runner.block_size, shares_prefixes=settings.prefix_cache
    )
    scheduler = Scheduler(
        blocks,
        StepPace(settings.step_target_ms),
        max_batch_size=settings.max_batch_size,
        max_prefill_tokens=settings.max_prefill_tokens,
        adapters=model_runner.adapter_cache,
    )
    runner = FaultyRunner(model_runner, faults)
    return Engine(runner, model_runner.tokenizer, scheduler, adapters=model_runner.adapter_cache)
