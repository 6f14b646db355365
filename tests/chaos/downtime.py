"""Measures how long no worker served in a dead one's place, and finds workers that ended by themselves."""

import signal
import threading
import time
from typing import NamedTuple

from tests.chaos.cluster import ChaosWorker, Cluster

POLL_S = 0.05
TOLD_TO_END = (0, -signal.SIGKILL)


class Life(NamedTuple):
    """One worker process; times are of `time.monotonic()`, None before they come."""

    worker: ChaosWorker
    started_at: float
    serving_at: float | None = None
    ended_at: float | None = None

    @property
    def ended_by_itself(self) -> bool:
        """True if the worker served and then ended, neither killed nor drained."""
        has_served = self.serving_at is not None and self.ended_at is not None
        return has_served and self.worker.process.wait() not in TOLD_TO_END


class Outage(NamedTuple):
    """The time from the end of a worker to the moment at which its successor serves."""

    seconds: float
    start_s: float
    """The part of it in which the successor started."""

    @property
    def beyond_start_s(self) -> float:
        return self.seconds - self.start_s


class Downtime:
    """Watches all workers of a cluster from a thread of its own."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._lives: dict[str, Life] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="downtime")

    def start(self) -> None:
        """Begins to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the watching."""
        self._stopped.set()
        self._thread.join()

    @property
    def outages(self) -> list[Outage]:
        """All outages that are over, by the URL through which the worker reaches the server."""
        return [
            Outage(after.serving_at - life.ended_at, after.serving_at - after.started_at)
            for life in self._lives.values()
            if life.ended_at is not None and life.serving_at is not None
            if (after := self._successor(life)) is not None and after.serving_at is not None
        ]

    @property
    def ended_by_themselves(self) -> list[str]:
        """The names of workers that served, and then ended without being told to."""
        return [name for name, life in self._lives.items() if life.ended_by_itself]

    def _successor(self, life: Life) -> Life | None:
        """The next worker at the same URL that served."""
        later = [
            other
            for other in self._lives.values()
            if other.worker.url == life.worker.url and other.started_at > life.started_at and other.serving_at
        ]
        return min(later, key=lambda other: other.started_at, default=None)

    def _run(self) -> None:
        while not self._stopped.wait(POLL_S):
            now = time.monotonic()
            for worker in list(self._cluster.workers):
                self._lives.setdefault(worker.name, Life(worker, now))
            for name, life in list(self._lives.items()):
                self._lives[name] = _seen(life, now)


def _seen(life: Life, now: float) -> Life:
    if life.serving_at is None and "serving " in life.worker.process.output:
        life = life._replace(serving_at=now)
    if life.ended_at is None and not life.worker.is_running:
        life = life._replace(ended_at=now)
    return life
