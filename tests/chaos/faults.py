"""Random faults for a deployment in which every connection runs through a proxy."""

import random
import time
from collections.abc import Callable, Sequence
from functools import partial

from tests.chaos import jumping_clock
from tests.chaos.cluster import API_LEASE_S, LEASE_S, ChaosWorker, Cluster
from tests.chaos.garbled import garble_request, garble_shared
from tests.chaos.neighbors import Neighbors
from tests.chaos.proxy import Proxy, script_marker
from tests.deployment import Process
from tests.server_faults import disk_full, strike, without_space
from tests.waiting import wait_until

START_LIMIT_S = 60
WORKER_SCRIPTS = ("claim", "append", "renew", "reap", "sweep", "hand_back")
SAID = ("BUSY", "NOREPLICAS", "READONLY", "MISCONF")
WEIGHTS = {"worker killed": 4, "worker frozen": 2, "worker drained": 2}
"""The weights with which faults are drawn; 1 for those not listed."""


class FaultMaker:
    """Breaks one thing at a time, and restarts what died as a supervisor would."""

    def __init__(
        self, cluster: Cluster, worker_proxies: Sequence[Proxy], api_proxy: Proxy, rng: random.Random
    ) -> None:
        self._cluster = cluster
        self._worker_proxies = worker_proxies
        self._api_proxy = api_proxy
        self._rng = rng
        self.struck: list[tuple[float, str]] = []
        """Time and name of each fault so far."""
        self.crash_times: list[float] = []
        """Times at which requests lost their worker."""
        self.garbled: set[str] = set()
        """Requests that may fail because one of their records was garbled."""
        self.neighbors = Neighbors(cluster, rng)
        self._crashes: dict[str, Callable[[], None]] = {
            "worker killed": self._kill,
            "worker frozen": self._freeze,
            "worker in a black hole": self._isolate_worker,
            "claim unheard": lambda: self._swallow(("claim",)),
        }
        self._others: dict[str, Callable[[], None]] = {
            "worker drained": self._drain,
            "worker connections reset": self._reset_workers,
            "API connections reset": self._reset_api,
            "API in a black hole": self._isolate_api,
            "reply swallowed": lambda: self._swallow(WORKER_SCRIPTS[1:]),
            "enqueue unheard": lambda: self._api_proxy.swallow_replies(script_marker("enqueue")),
            "Redis killed": self._kill_redis,
            "record of a request garbled": lambda: garble_request(self._cluster, self._rng, self.garbled),
            "shared record garbled": lambda: garble_shared(self._cluster.connection, self._rng),
            "stock worker beside ours": self.neighbors.run_stock_worker,
            "hostile body": self.neighbors.send_hostile_bodies,
            "client that never reads": self.neighbors.read_nothing,
            "flood of long prompts": self.neighbors.flood,
            "clock jumps": self._jump,
            "disk of a process full": self._fill_disk,
            "disk of Redis full": self._fill_disk_of_redis,
            **{f"Redis says {code}": partial(self._say, code) for code in SAID},
        }

    def strike(self, *, may_crash: bool) -> None:
        """Causes one fault and waits for its end; loses a worker only if `may_crash`."""
        faults = self._others | (self._crashes if may_crash else {})
        names = sorted(faults)
        name = self._rng.choices(names, [WEIGHTS.get(name, 1) for name in names])[0]
        self.struck.append((time.monotonic(), name))
        if name in self._crashes:
            self.crash_times.append(time.monotonic())
        faults[name]()

    def restart_dead(self) -> None:
        """Starts a worker behind each proxy that has none; does not wait for it."""
        live = self._cluster.live_workers()
        for proxy in self._worker_proxies:
            if not any(worker.url == proxy.url for worker in live):
                self._cluster.start_worker(proxy.url, wait=False)

    def heal(self) -> None:
        """Ends all faults; returns when every worker serves."""
        for proxy in (*self._worker_proxies, self._api_proxy):
            proxy.swallow_replies(b"", count=0)
            proxy.release()
        for worker in self._cluster.live_workers():
            worker.thaw()
        wait_until(self._all_serve, START_LIMIT_S, "workers that serve behind all proxies")

    def _all_serve(self) -> bool:
        """True if all workers serve; restarts those that died while starting because Redis was away."""
        self.restart_dead()
        return all(worker.is_serving for worker in self._cluster.workers)

    def _victim(self) -> ChaosWorker:
        """A serving worker, if any; those that still load their model are left alone."""
        serving = wait_until(self._serving, START_LIMIT_S, "a worker that serves")
        return self._rng.choice(serving)

    def _serving(self) -> list[ChaosWorker]:
        self.restart_dead()
        return [worker for worker in self._cluster.live_workers() if worker.is_serving]

    def _kill(self) -> None:
        self._victim().kill()

    def _freeze(self) -> None:
        victim = self._victim()
        victim.freeze()
        time.sleep(self._rng.uniform(0.2, 3.0) * LEASE_S)
        victim.thaw()

    def _drain(self) -> None:
        self._victim().terminate()

    def _isolate_worker(self) -> None:
        self._hold(self._rng.choice(self._worker_proxies), self._rng.uniform(0.2, 2.0) * LEASE_S)

    def _isolate_api(self) -> None:
        self._hold(self._api_proxy, self._rng.uniform(0.05, 0.4) * API_LEASE_S)

    def _hold(self, proxy: Proxy, seconds: float) -> None:
        up, down = self._rng.choice([(True, True), (True, False), (False, True)])
        proxy.hold(up=up, down=down)
        time.sleep(seconds)
        proxy.release()

    def _reset_workers(self) -> None:
        for proxy in self._worker_proxies:
            proxy.reset_some(self._rng)

    def _reset_api(self) -> None:
        self._api_proxy.reset_some(self._rng)

    def _swallow(self, scripts: Sequence[str]) -> None:
        marker = script_marker(self._rng.choice(scripts))
        self._rng.choice(self._worker_proxies).swallow_replies(marker)

    def _say(self, code: str) -> None:
        strike(self._cluster.connection, code, self._rng.uniform(0.5, 3.0))

    def _jump(self) -> None:
        self._process().send(self._rng.choice((jumping_clock.FORWARD, jumping_clock.BACK)))

    def _fill_disk(self) -> None:
        with disk_full(self._process().pid):
            time.sleep(self._rng.uniform(0.5, 3.0))

    def _fill_disk_of_redis(self) -> None:
        with without_space(self._cluster.connection):
            time.sleep(self._rng.uniform(0.5, 3.0))

    def _process(self) -> Process:
        """A process of ours: a worker that serves, or the API."""
        return self._rng.choice([*(worker.process for worker in self._serving()), self._cluster.api.process])

    def _kill_redis(self) -> None:
        self._cluster.server.kill()
        time.sleep(self._rng.uniform(0.0, 1.0))
        self._cluster.server.start()
