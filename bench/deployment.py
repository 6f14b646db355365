"""A deployment to measure: embedded server, `rq worker` processes and uvicorn, as in `lorelay serve`."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

import psutil  # type: ignore[import-untyped]
import redis

from lorelay import embedded
from lorelay.devices import visible_gpus, worker_environments
from lorelay.probes import is_http_ready
from lorelay.processes import ChildSpec, start_process
from lorelay.status import live_workers
from shared.control_groups import num_usable_cores
from shared.messages import ForwardState
from shared.queue.connections import SOCKET_TIMEOUT_S
from shared.settings import WorkerSettings

ROOT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
START_LIMIT_S = 300.0
COMPILE_LIMIT_S = 600.0
STOP_LIMIT_S = 60.0
POLL_S = 0.05


class StartFailed(Exception):
    """A process ended, or was not ready in time. The message contains the end of its log."""


class Uvicorn:
    """A context manager that runs an app under uvicorn, on a free port."""

    def __init__(
        self, app: str, log: Path, variables: Mapping[str, str] | None = None, tree: Path = ROOT
    ) -> None:
        """`app`: `module:function` of an app with a route `/ready`. `tree`: the checkout whose code runs."""
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "uvicorn", "--factory", app, "--host", HOST, "--port", str(port)]
        self._spec = ChildSpec("api", tuple(command), env=variables or {}, cwd=tree)
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"http://{HOST}:{port}"

    @property
    def pid(self) -> int:
        """Process id of uvicorn, once it has started."""
        assert self._process is not None
        return self._process.pid

    def cpu_s(self) -> float:
        """Returns the CPU time (s) that uvicorn has used so far."""
        times = psutil.Process(self.pid).cpu_times()
        return float(times.user + times.system)

    def __enter__(self) -> Self:
        self._process = start_logged(self._spec, self._log)
        try:
            wait_until(lambda: is_http_ready(self.url), {self._log: self._process})
        except BaseException:
            end_process(self._process)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        end_process(self._process)


class Deployment:
    """A context manager that runs workers, one API and a Redis server, with all files in `folder`."""

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, str],
        *,
        num_workers: int = 1,
        worker_class: str = "worker.LoraWorker",
        tree: Path = ROOT,
    ) -> None:
        """`settings`: values by the names of the settings, without the prefix `LORELAY_`.

        `tree` is the checkout whose code runs: this one, or a checkout of another release.
        """
        self._folder = folder
        self._settings = {f"LORELAY_{name.upper()}": value for name, value in settings.items()}
        self._worker_settings = WorkerSettings.load(**settings)
        self._num_workers = num_workers
        self._worker_class = worker_class
        self._tree = tree
        self._state = embedded.StateFolder(folder / "state")
        self._stack = contextlib.ExitStack()
        self.server_pid = 0
        """Process id of the Redis server; 0 before it has started."""
        self.worker_pids: list[int] = []
        """Process ids of the workers; empty before they have started."""

    @property
    def url(self) -> str:
        """URL of the API, without `/v1`."""
        return self.api.url

    @property
    def base_name(self) -> str:
        """The base model's public name."""
        return self._worker_settings.base_name

    def worker_log(self, number: int) -> Path:
        """Returns the log file of a worker; workers are numbered from 0."""
        return self._log(f"worker-{number}")

    def connect(self) -> redis.Redis:
        """Opens a client of the Redis server; the caller closes it."""
        return redis.Redis.from_url(self._state.url, socket_timeout=SOCKET_TIMEOUT_S)

    def forward_states(self) -> set[str]:
        """Returns the workers' forward states from `lorelay status`; "" if a worker does not serve yet."""
        with self.connect() as connection:
            live = live_workers(connection, self.base_name)
        keys = [(socket.gethostname(), pid) for pid in self.worker_pids]
        return {live[key].forward if key in live else "" for key in keys}

    def __enter__(self) -> Self:
        try:
            self._folder.mkdir(parents=True)
            self._stack.enter_context(self._state)
            self._start_server()
            self._start_workers()
            env = {**self._variables, "LORELAY_REDIS_URL": self._state.url}
            api = Uvicorn("api.main:create_app", self._log("api"), env, self._tree)
            self.api = self._stack.enter_context(api)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def _variables(self) -> dict[str, str]:
        """Environment variables of the API and the workers."""
        # An inherited PYTHONPATH may name this checkout, and would come before the working directory.
        return self._settings | ({} if self._tree == ROOT else {"PYTHONPATH": str(self._tree)})

    def _start_server(self) -> None:
        command = self._state.command(embedded.find_binary())
        spec = ChildSpec("server", tuple(command), cwd=self._state.path, pass_fds=(self._state.lock_fd,))
        server = self._start(spec)
        self.server_pid = server.pid
        wait_until(lambda: embedded.answers(self._state.url), {self._log("server"): server})

    def _start_workers(self) -> None:
        settings = self._worker_settings
        gpus = visible_gpus(os.environ) if settings.device != "cpu" else []
        shares = worker_environments(settings, self._num_workers, gpus, num_usable_cores())
        urls = {"LORELAY_REDIS_URL": self._state.url, "RQ_REDIS_URL": self._state.url}
        command = (sys.executable, "-m", "rq.cli", "worker", "-w", self._worker_class)
        specs = [
            ChildSpec(f"worker-{n}", command, env={**self._variables, **urls, **share}, cwd=self._tree)
            for n, share in enumerate(shares)
        ]
        workers = {self._log(spec.name): self._start(spec) for spec in specs}
        self.worker_pids = [worker.pid for worker in workers.values()]
        wait_until(lambda: "" not in self.forward_states(), workers)
        wait_until(lambda: ForwardState.COMPILING not in self.forward_states(), workers, COMPILE_LIMIT_S)

    def _start(self, spec: ChildSpec) -> subprocess.Popen[bytes]:
        """Starts a process that ends with the deployment."""
        process = start_logged(spec, self._log(spec.name))
        self._stack.callback(end_process, process)
        return process

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"


def start_logged(spec: ChildSpec, log: Path) -> subprocess.Popen[bytes]:
    """Starts a process whose output goes to a file."""
    with log.open("wb") as output:
        return start_process(spec, output)


def wait_until(
    condition: Callable[[], bool],
    needed: Mapping[Path, subprocess.Popen[bytes]],
    limit_s: float = START_LIMIT_S,
) -> None:
    """Waits for a condition; `needed` has the processes that must run meanwhile, by their log files.

    Raises:
        StartFailed: one of the processes has ended, or `limit_s` is over.
    """
    deadline = time.monotonic() + limit_s
    while not condition():
        ended = [log for log, process in needed.items() if process.poll() is not None]
        if ended or time.monotonic() > deadline:
            log = (ended or list(needed))[0]
            raise StartFailed(f"{log.stem} did not come up:\n{log.read_text(errors='replace')[-2000:]}")
        time.sleep(POLL_S)


def end_process(process: subprocess.Popen[bytes]) -> None:
    """Ends a process with SIGTERM, then a second SIGTERM (which ends a draining worker), then SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_LIMIT_S if number == signal.SIGKILL else STOP_LIMIT_S / 4)
