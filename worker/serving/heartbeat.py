"""The worker's heartbeat thread, which renews the worker's leases and requeues requests of dead workers."""

import logging
import threading
import time
from collections.abc import Callable, Mapping

import redis

from shared.logs import fields
from shared.queue.connections import is_transient
from shared.queue.outages import Outages
from shared.queue.upkeep_streams import UpkeepStreams
from shared.settings import WorkerSettings
from worker.serving.consumer import Consumer, HeldRequests

logger = logging.getLogger(__name__)


class Heartbeat:
    """Does a worker's periodic work in a separate thread, so that long steps don't delay this work.

    After a restart of Redis, every lease looks expired until its owner renews it. This thread therefore
    requeues requests with expired leases, and aborts requests of dead APIs, only after its connection to
    Redis has been up for the duration of a lease.
    """

    def __init__(
        self,
        streams: UpkeepStreams,
        held: HeldRequests,
        consumer: Consumer,
        settings: WorkerSettings,
        *,
        served: Callable[[], Mapping[str, str]],
        on_beat: Callable[[], None],
        watch_engine: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`served` returns the worker's queues with their weights versions; see `UpkeepStreams.serve`."""
        self._streams = streams
        self._held = held
        self._consumer = consumer
        self._settings = settings
        self._served = served
        self._published: Mapping[str, str] | None = None
        """The queues and versions that were last written to Redis."""
        self._on_beat = on_beat
        self._watch_engine = watch_engine
        self._clock = clock
        self.outages = Outages(logger)
        self._stopped = threading.Event()
        self._connected_since: float | None = None
        self._renewed_at = self._swept_at = float("-inf")

    def stop(self) -> None:
        """Ends `run` after its current turn."""
        self._stopped.set()

    def run(self) -> None:
        """Repeats `turn` until `stop`.

        If a part of a turn fails while Redis is down, a later turn repeats this part.
        """
        while not self._stopped.wait(min(self._settings.heartbeat_s, self._settings.reap_s)):
            self._watch_engine()
            try:
                self.turn()
            except redis.RedisError as error:
                if not is_transient(error):
                    raise
                self._connected_since = None
                self.outages.begin("heartbeat", error)
            else:
                self.outages.end("heartbeat")

    def turn(self) -> None:
        """Renews leases, reaps requests, ends unserved requests, and sweeps queues, each when it is due."""
        now = self._clock()
        connected_s = now - self._connected_since if self._connected_since is not None else 0.0
        if now - self._renewed_at >= self._settings.heartbeat_s:
            self._renew(abort_unread=connected_s >= self._settings.api_lease_s)
            self._renewed_at = now
        if self._connected_since is None:
            self._connected_since = now
        if connected_s >= self._settings.lease_s:
            self._reap()
        # One heartbeat suffices here, not a whole lease: in that time, live workers write their models again.
        if connected_s >= self._settings.heartbeat_s:
            self._end_unserved()
        if now - self._swept_at >= self._settings.sweep_s:
            self._streams.sweep(self._served())
            if not self._streams.serves(self._servable):
                self._publish_served()
            self._swept_at = now

    def _renew(self, *, abort_unread: bool) -> None:
        if self._published != self._servable:
            self._publish_served()
        news = self._streams.renew(self._held.snapshot(), abort_unread=abort_unread)
        if not news.has_served:
            self._publish_served()
        self._consumer.abort(news.aborted)
        if not news.had_lease:
            # Redis or this process was paused: first give other workers time to renew their leases.
            self._connected_since = self._clock()
        self._on_beat()

    @property
    def _servable(self) -> Mapping[str, str]:
        return {} if self._consumer.is_draining else self._served()

    def _publish_served(self) -> None:
        """Writes to Redis the queues that this worker serves, with their weights versions."""
        self._published = self._servable
        self._streams.serve(self._published)

    def _end_unserved(self) -> None:
        for request_id in self._streams.end_unserved(min_pause_s=self._settings.reap_s):
            logger.warning(
                "request %s ended: no live worker has its weights", request_id, extra=fields("version_gone")
            )

    def _reap(self) -> None:
        reaped = self._streams.reap(self._settings.max_crashes_alone)
        for request_id in reaped.requeued:
            logger.warning("request %s lost its worker: requeued", request_id, extra=fields("reap"))
        for request_id in reaped.dead:
            logger.error(
                "request %s crashed its workers too often: failed", request_id, extra=fields("dead_letter")
            )
