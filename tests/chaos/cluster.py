"""A real deployment for tests to break: one server, named workers, APIs, some of them behind proxies."""

import contextlib
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
import redis
from rq.defaults import RQ_KEY_PREFIX
from rq.suspension import resume, suspend

from shared.queue import keys
from shared.queue.names import queue_name, slug
from tests.chaos.recorder import MODELS
from tests.deployment import BIN, DEFAULTS, ROOT, Process
from tests.forked import Nursery
from tests.redis_server import RedisServer, free_port, server_binary
from tests.tiny_models import build_adapter, build_model
from tests.waiting import wait_until

BASE = MODELS[0]
LEASE_S = 1.0
REAP_S = 0.1
API_LEASE_S = 1.5
FAILOVER_LIMIT_S = LEASE_S + REAP_S + 1
"""The longest pause of a stream whose worker dies while another one is up."""
TTL_S = 4
START_LIMIT_S = 60
WORKER_CLASS = "worker.LoraWorker"
COMPLAINT = re.compile("^.*(Traceback|internal error|a thread failed)", re.MULTILINE)

TIMERS = {
    "lease_s": str(LEASE_S),
    "heartbeat_s": "0.25",
    "reap_s": str(REAP_S),
    "poll_s": "0.1",
    "sweep_s": "0.5",
    "api_lease_s": str(API_LEASE_S),
    "step_delay_s": "0.03",
    "max_prefill_tokens": "64",
    "redis_timeout_s": "1",
    "result_ttl_s": str(TTL_S),
    "failure_ttl_s": str(TTL_S),
    "stream_ttl_s": "60",
    "queue_time_limit_s": "60",
    "no_worker_wait_s": "60",
    "generation_limit_s": "60",
}

UNHURRIED = {"step_delay_s": "0", "lease_s": "30", "api_lease_s": "30", "redis_timeout_s": "30"}
"""The settings for fault-free answers: a deployment without faults that a busy machine does not break."""


def build_models(folder: Path) -> dict[str, str]:
    """A worker's settings for a random llama `tiny` with two adapters, built in `folder`, in float64."""
    model = build_model(folder / BASE)
    everywhere = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    adapters = {
        "a": build_adapter(folder / "a", model, rank=8),
        "b": build_adapter(folder / "b", model, rank=4, targets=everywhere, seed=1),
    }
    return {
        "model": str(model),
        "adapters": " ".join(f"{name}={path}" for name, path in adapters.items()),
        "dtype": "float64",
        "num_threads": "1",
        "cache_max_bytes": str(64 * 2**20),
    }


class ChaosWorker:
    """One `rq worker` process, and what Redis tells about it."""

    def __init__(
        self, name: str, url: str, process: Process, connection: redis.Redis, *, is_plain: bool = True
    ) -> None:
        self.name = name
        self.is_plain = is_plain
        """True if this worker has the cluster's own settings."""
        self.url = url
        """The URL by which this worker reaches the server."""
        self.process = process
        self._connection = connection

    @property
    def is_running(self) -> bool:
        """True while the process exists."""
        return self.process.is_running

    @property
    def is_serving(self) -> bool:
        """True once the worker has loaded its model."""
        return self.is_running and "serving " in self.process.output

    def wait_until_serving(self) -> Self:
        """Returns when the worker takes requests."""
        self.process.wait_for("serving ")
        return self

    def owned_ids(self) -> list[str]:
        """The requests that this worker owns now."""
        members = self._connection.smembers(f"{RQ_KEY_PREFIX}:worker:{self.name}:executions")
        return [member.decode().partition(":")[0] for member in members]

    def owned_log_lengths(self) -> list[int]:
        """The number of events of each request that this worker owns, fewest first."""
        pipeline = self._connection.pipeline(transaction=False)
        for request_id in self.owned_ids():
            pipeline.llen(keys.log(request_id))
        return sorted(pipeline.execute())

    def kill(self) -> None:
        """Sends SIGKILL."""
        self.process.kill()

    def freeze(self) -> None:
        """Sends SIGSTOP."""
        self.process.send(signal.SIGSTOP)

    def thaw(self) -> None:
        """Sends SIGCONT."""
        self.process.send(signal.SIGCONT)

    def terminate(self) -> None:
        """Sends SIGTERM."""
        self.process.send(signal.SIGTERM)


class ChaosApi:
    """One uvicorn process."""

    def __init__(self, url: str, process: Process) -> None:
        self.url = url
        self.process = process

    @property
    def is_ready(self) -> bool:
        """True if `/ready` answers 200."""
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/ready", timeout=5, trust_env=False).status_code == 200
        return False


class Cluster:
    """One server with its workers and APIs. At the end of a `with` statement all of them are killed."""

    def __init__(
        self,
        models: Mapping[str, str],
        nursery: Nursery | None = None,
        *,
        append_only: bool = False,
        tcp: bool = False,
        options: Sequence[str] = (),
        **settings: str,
    ) -> None:
        self._nursery = nursery
        self._folder = Path(tempfile.mkdtemp(prefix="lorelay-chaos-"))
        self._settings: dict[str, str] = dict(models) | TIMERS | settings
        port = free_port() if tcp else None
        self.server = RedisServer(
            server_binary(), self._folder / "redis", port=port, append_only=append_only, options=options
        )
        self.connection = redis.Redis.from_url(self.server.url)
        self._processes: list[Process] = []
        self._num_read: dict[Process, int] = {}
        self.workers: list[ChaosWorker] = []
        """All workers that were started and that `live_workers` has not found dead."""
        self.apis: list[ChaosApi] = []

    @property
    def port(self) -> int:
        """The server's port; only with `tcp`."""
        return int(self.connection.connection_pool.connection_kwargs["port"])

    @property
    def api(self) -> ChaosApi:
        """The API that was started first."""
        return self.apis[0]

    def start_worker(
        self,
        url: str | None = None,
        *,
        wait: bool = True,
        program: Sequence[str] = (),
        worker_class: str = WORKER_CLASS,
        tree: Path = ROOT,
        **settings: str,
    ) -> ChaosWorker:
        """Starts a worker, at the server or at the proxy that `url` names.

        `program` replaces `rq`; `tree` is the checkout whose code runs.
        """
        name, url = f"w{len(self._processes)}", url or self.server.url
        arguments = ["worker", "-u", url, "-w", worker_class, "--name", name]
        arguments += ["--connection-class", "worker.serving.patience.PatientRedis"]
        process = self._start(arguments, program, settings, tree)
        is_plain = not (settings or program or worker_class != WORKER_CLASS)
        self.workers.append(ChaosWorker(name, url, process, self.connection, is_plain=is_plain))
        return self.workers[-1].wait_until_serving() if wait else self.workers[-1]

    def run_stock_worker(self, *options: str) -> None:
        """Runs a worker of RQ's own class until the base's queue is empty; it fails all that it takes."""
        arguments = ["worker", "-u", self.server.url, "--burst", *options, queue_name(BASE, None)]
        process = self._launch(arguments, (), {}, ROOT, self._folder / "stock-worker.log")
        try:
            process.wait(START_LIMIT_S)
        finally:
            process.kill()

    def start_api(self, url: str | None = None, *, tree: Path = ROOT, **settings: str) -> ChaosApi:
        """Starts an API, at the server or at the proxy that `url` names; returns when it is ready."""
        port = free_port()
        wrapper = ["tests.chaos.jumping_clock"] if tree == ROOT else []
        program = [sys.executable, "-m", *wrapper, "uvicorn", "--factory", "api.main:create_app"]
        program += ["--port", str(port)]
        process = self._start([], program, {"redis_url": url or self.server.url} | settings, tree)
        process.wait_for("Uvicorn running")
        self.apis.append(ChaosApi(f"http://127.0.0.1:{port}", process))
        return self.apis[-1]

    def owned_ids(self) -> set[str]:
        """The requests that a worker owns now."""
        prefix = keys.owner("")
        names = self.connection.scan_iter(f"{prefix}*", count=1000)
        return {name.decode().removeprefix(prefix) for name in names}

    def queued_ids(self) -> set[str]:
        """The requests that wait in a queue now."""
        queues = self.connection.scan_iter(f"{RQ_KEY_PREFIX}:queue:*", count=1000)
        return {item.decode() for queue in queues for item in self.connection.lrange(queue, 0, -1)}

    def known_ids(self) -> set[str]:
        """The requests that wait or run now."""
        # The queues are read twice: a request that is claimed or handed back meanwhile is seen at least once.
        return self.queued_ids() | self.owned_ids() | self.queued_ids()

    def live_workers(self) -> list[ChaosWorker]:
        """The workers whose processes exist."""
        self.workers = [worker for worker in self.workers if worker.is_running]
        return self.workers

    def ensure_workers(self, num_workers: int) -> list[ChaosWorker]:
        """Leaves this number of serving workers with the cluster's own settings, and no others."""
        plain = [worker for worker in self.live_workers() if worker.is_plain]
        for worker in set(self.workers) - set(plain[:num_workers]):
            worker.kill()
        while len(self.live_workers()) < num_workers:
            self.start_worker(wait=False)
        for worker in self.workers:
            worker.wait_until_serving()
        self.wait_until_leased(num_workers)
        return list(self.workers)

    def start_companion(self) -> ChaosWorker:
        """Starts the only worker, too small for all of `ASKS`: a worker started next gets some of them."""
        self.ensure_workers(0)
        return self.start_worker(max_batch_size="24")

    def wait_until_leased(self, num_workers: int) -> None:
        """Returns when exactly this number of workers holds a lease, so that dead ones are forgotten."""

        def is_leased() -> bool:
            seconds, micros = self.connection.time()
            now_ms = seconds * 1000 + micros // 1000
            return self.connection.zcount(keys.workers(slug(BASE)), now_ms, "+inf") == num_workers

        wait_until(is_leased, START_LIMIT_S, f"{num_workers} workers with a lease")

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Runs the context with claims suspended, as between `rq suspend` and `rq resume`."""
        suspend(self.connection)
        try:
            yield
        finally:
            resume(self.connection)

    def outputs(self, num_chars: int = 6000) -> list[tuple[str, str]]:
        """The last output of each process, under its name; empty once the cluster is closed."""
        if not self._folder.exists():
            return []
        named = [(worker.name, worker.process) for worker in self.workers]
        named += [(api.url, api.process) for api in self.apis]
        return [(name, process.output[-num_chars:]) for name, process in named]

    def take_complaints(self) -> list[str]:
        """Log lines since the last call about faults of Lorelay itself, not of its surroundings."""
        found = []
        for process in self._processes:
            output = process.output
            new, self._num_read[process] = output[self._num_read.get(process, 0) :], len(output)
            if match := COMPLAINT.search(new):
                found.append(new[match.start() : match.start() + 4000])
        return found

    def __enter__(self) -> Self:
        self.server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            error.add_note("\n".join(f"--- {name}\n{output}" for name, output in self.outputs()))
        for process in self._processes:
            process.kill()
        self.connection.close()
        self.server.kill()
        shutil.rmtree(self._folder)

    def _start(
        self, arguments: list[str], program: Sequence[str], settings: Mapping[str, str], tree: Path
    ) -> Process:
        """Starts `program`, or `rq`, with `arguments`; the process ends with the cluster."""
        log = self._folder / f"process-{len(self._processes)}.log"
        process = self._launch(arguments, program, settings, tree, log)
        self._processes.append(process)
        return process

    def _launch(
        self, arguments: list[str], program: Sequence[str], settings: Mapping[str, str], tree: Path, log: Path
    ) -> Process:
        named = {f"LORELAY_{name.upper()}": value for name, value in (self._settings | settings).items()}
        if program or tree != ROOT or self._nursery is None:
            return Process([*(program or [str(BIN / "rq")]), *arguments], named, log, tree=tree)
        return self._nursery.start(arguments, DEFAULTS | named, log)
