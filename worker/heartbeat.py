"""The worker's heartbeat thread: renews its leases, and reaps those that others let expire."""

import logging
import threading
import time
from collections.abc import Callable

import redis

from shared.logs import fields
from shared.streams import WorkerStreams
from worker.consumer import HeldRequests

logger = logging.getLogger(__name__)


class Heartbeat:
    """Renews every `heartbeat_s`, reaps every `reap_s`.

    It reaps only once its connection has been up for a whole lease: after a restart of Redis every lease
    looks expired until its owner has had the time to renew it.
    """

    def __init__(
        self,
        streams: WorkerStreams,
        held: HeldRequests,
        *,
        lease_s: float,
        heartbeat_s: float,
        reap_s: float,
        on_beat: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._streams = streams
        self._held = held
        self._lease_s = lease_s
        self._heartbeat_s = heartbeat_s
        self._reap_s = reap_s
        self._on_beat = on_beat
        self._clock = clock
        self._stopped = threading.Event()
        self._connected_since: float | None = None
        self._renewed_at: float | None = None

    def stop(self) -> None:
        """Ends `run` after its present turn."""
        self._stopped.set()

    def run(self) -> None:
        """Takes turns until `stop`; a lost connection is retried at the next one."""
        while not self._stopped.wait(min(self._heartbeat_s, self._reap_s)):
            try:
                self.turn()
            except (redis.ConnectionError, redis.TimeoutError) as error:
                self._connected_since = None
                logger.warning("heartbeat failed: %s", error, extra=fields("heartbeat_failed"))

    def turn(self) -> None:
        """Renews if it is time to, and reaps if it may."""
        now = self._clock()
        if self._renewed_at is None or now - self._renewed_at >= self._heartbeat_s:
            self._streams.renew(self._held.snapshot())
            self._on_beat()
            self._renewed_at = now
        if self._connected_since is None:
            self._connected_since = now
        elif now - self._connected_since >= self._lease_s:
            self._reap()

    def _reap(self) -> None:
        for request_id in self._streams.reap():
            logger.warning("request %s lost its worker: requeued", request_id, extra=fields("reap"))
