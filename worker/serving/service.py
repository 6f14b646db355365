"""A worker without RQ, which creates, connects, runs and stops engine loop, consumer and heartbeat."""

import gc
import logging
import threading
from collections.abc import Callable

from shared.queue.order import WaitingOrder
from shared.queue.outages import Outages
from shared.queue.worker_streams import WorkerStreams
from shared.settings import WorkerSettings
from worker.engine.block_manager import BlockManager
from worker.engine.engine import BatchingEngine
from worker.engine.ports import Engine, Model
from worker.engine.scheduler import Scheduler
from worker.engine.step_pace import StepPace
from worker.serving.claimer import Claimer
from worker.serving.consumer import IO, Consumer, HeldRequests
from worker.serving.engine_loop import EngineLoop
from worker.serving.failure import Failure
from worker.serving.faults import Faults, faulty_encode, faulty_model, faulty_streams
from worker.serving.hang_watch import HangWatch
from worker.serving.heartbeat import Heartbeat
from worker.serving.served import ServedQueues, adapter_slots

logger = logging.getLogger("rq.worker")

HEARTBEAT = "heartbeat"


class WorkerService:
    """Serves the queues of one model in this process. The engine runs in the thread that calls `run`."""

    def __init__(
        self,
        engine: Engine,
        queues: ServedQueues,
        settings: WorkerSettings,
        *,
        name: str,
        faults: Faults,
        make_streams: Callable[[], WorkerStreams],
        on_beat: Callable[[], None] = lambda: None,
    ) -> None:
        """`make_streams` is called for each thread that needs Redis; `on_beat` at each heartbeat."""
        self._name = name
        self._settings = settings
        self._held = HeldRequests()
        self._engine = engine
        streams = faulty_streams(make_streams(), faults)
        self._consumer = Consumer(
            streams,
            _claimer(streams, queues, engine, settings),
            self._held,
            capacity=lambda: engine.max_num_sequences,
            poll_s=settings.poll_s,
            encode=faulty_encode(engine.encode, faults),
        )
        self._loop = EngineLoop(
            self._engine,
            self._consumer,
            self._held,
            drain_s=settings.drain_s,
            step_delay_s=settings.step_delay_s,
            worker_name=name,
        )
        upkeep = make_streams()
        hang_watch = HangWatch(
            name,
            settings.step_limit_s,
            step_age_s=self._loop.step_age_s,
            longest_encode=self._consumer.longest_encode,
            blame=lambda held: upkeep.append([held], [], isolated=held.request_id),
        )
        self._heartbeat = Heartbeat(
            upkeep,
            self._held,
            self._consumer,
            settings,
            served=queues.versions,
            on_beat=on_beat,
            watch_engine=hang_watch.check,
        )

    @property
    def num_claimed(self) -> int:
        """The number of requests that this worker has claimed so far."""
        return self._consumer.num_claimed

    @property
    def is_draining(self) -> bool:
        """True once `drain` was called."""
        return self._loop.is_draining

    @property
    def remains(self) -> str:
        """Text for the log: the number of requests and cache blocks that the engine still holds."""
        return self._engine.remains

    def report_outages_to(self, outages: Outages) -> None:
        """Makes all threads report to `outages`, so that each outage of Redis is logged only once."""
        self._consumer.outages = self._heartbeat.outages = outages

    def take_lease(self) -> None:
        """Writes to Redis that this worker is alive, and what it serves; raises `redis.RedisError`."""
        self._heartbeat.turn()

    def drain(self) -> None:
        """Stops claiming and lets running requests finish. A second call hands back all requests at once."""
        self._loop.drain()

    def stop_request(self, request_id: str) -> None:
        """Ends one request because an operator stopped it; ignores a request that is not held."""
        self._consumer.stop_request(request_id)

    def run(self, failure: Failure, give_up_at: Callable[[], float], *, burst: bool = False) -> None:
        """Serves until `drain`, until a thread fails, or with `burst` until no request waits.

        The end has four stages: the engine stops, the I/O thread stops, the remaining requests are handed
        back, and the heartbeat stops. `give_up_at()` returns the `time.monotonic()` until which the third
        stage is retried.
        """
        # Exclude libraries and model from garbage collection: they are never freed, and each scan of them
        # would pause all streams for 0.2 s.
        gc.collect()
        gc.freeze()
        threads = {
            name: threading.Thread(target=failure.guard, args=(run,), name=name, daemon=True)
            for name, run in {**self._consumer.threads, HEARTBEAT: self._heartbeat.run}.items()
        }
        for thread in threads.values():
            thread.start()
        has_crashed, num_handed_back = True, 0
        try:
            self._loop.run(lambda: failure.error is not None or (burst and self._consumer.is_idle))
            has_crashed = failure.is_crash
        finally:
            self._consumer.stop()
            threads[IO].join()
            try:
                # After a crash, nothing is handed back: reap.lua requeues the requests and counts the crash.
                if not has_crashed:
                    num_handed_back = self._consumer.hand_back(give_up_at())
            finally:
                self._heartbeat.stop()
                threads[HEARTBEAT].join()
        if num_handed_back:
            logger.warning("Worker %s: handed %d requests back", self._name, num_handed_back)


def _claimer(
    streams: WorkerStreams, queues: ServedQueues, engine: Engine, settings: WorkerSettings
) -> Claimer:
    """Creates a claimer, which gets weights from the settings, and the use of slots from the engine."""
    order = WaitingOrder(
        queues.name_of(None),
        max_wait_s=settings.max_wait_s,
        weights=queues.weights_by_queue(settings.adapter_weights),
    )
    return Claimer(
        streams,
        order,
        slots=lambda: adapter_slots(queues, engine.adapters),
        names_if_few=queues.names_if_few,
    )


def build_engine(model: Model, settings: WorkerSettings, faults: Faults) -> Engine:
    """Creates the batching engine for a model, with its block manager and scheduler."""
    blocks = BlockManager(
        model.num_blocks,
        model.block_size,
        shares_prefixes=settings.prefix_cache,
        shares_between_tenants=settings.share_prefixes_between_tenants,
    )
    scheduler = Scheduler(
        blocks,
        StepPace(settings.step_target_ms),
        max_batch_size=settings.max_batch_size,
        max_prefill_tokens=settings.max_prefill_tokens,
        adapters=model.adapter_cache,
    )
    return BatchingEngine(faulty_model(model, faults), scheduler)
