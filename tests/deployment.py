"""A real deployment on this machine: `rq worker` processes and a uvicorn on a server, for tests."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import httpx
import openai
import redis

from shared.queue import keys
from shared.queue.names import slug
from tests.redis_server import free_port
from tests.waiting import wait_until

if TYPE_CHECKING:
    from tests.forked import Nursery

ROOT = Path(__file__).parent.parent
START_LIMIT_S = 60
DEFAULTS = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "LORELAY_COMPILE": "kernels"}
BIN = Path(sys.executable).parent


class Process:
    """A child process whose output goes to a file."""

    def __init__(
        self, command: list[str], environment: dict[str, str], log: Path, *, tree: Path = ROOT
    ) -> None:
        """`tree` is the folder whose code runs: this checkout, or that of another release."""
        self._log = log
        environment = environment | ({} if tree == ROOT else {"PYTHONPATH": str(tree)})
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("LORELAY_", "RQ_"))}
        with log.open("wb") as output:
            self._popen = subprocess.Popen(
                command,
                env=inherited | DEFAULTS | environment,
                cwd=tree,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def output(self) -> str:
        """Everything that the process wrote so far."""
        return self._log.read_text()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._popen.pid

    @property
    def is_running(self) -> bool:
        return self._popen.poll() is None

    def send(self, signal_no: int) -> None:
        self._popen.send_signal(signal_no)

    def wait(self, timeout_s: float = 30) -> int:
        """Waits for the end of the process; returns its exit code."""
        return self._popen.wait(timeout_s)

    def stop(self) -> int:
        """Sends SIGTERM; returns the exit code."""
        self.send(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        self._popen.kill()
        self._popen.wait()

    def wait_for(self, text: str, limit_s: float = START_LIMIT_S) -> None:
        """Returns when the process has written `text`; fails if it ended before."""

        def said() -> bool:
            assert text in self.output or self.is_running, self.output
            return text in self.output

        wait_until(said, limit_s, f"{text!r} in {self._log}")


class Deployment:
    """Workers and APIs over one Redis; all of them are killed at the end.

    With a `nursery`, `start_worker` forks from it, which saves each worker its imports.
    """

    def __init__(
        self, redis_url: str, folder: Path, nursery: "Nursery | None" = None, **settings: str
    ) -> None:
        self.redis_url = redis_url
        self._nursery = nursery
        self._folder = folder
        self._environment = {f"LORELAY_{name.upper()}": value for name, value in settings.items()}
        self._processes: list[Process] = []
        self._clients: list[openai.OpenAI] = []
        self.api_url = ""

    def start_worker(self, *arguments: str, wait: bool = True, **settings: str) -> Process:
        """Starts `rq worker -w worker.LoraWorker`; returns when it serves."""
        command = [str(BIN / "rq"), "worker", "-u", self.redis_url, "-w", "worker.LoraWorker"]
        command += ["--connection-class", "worker.serving.patience.PatientRedis", *arguments]
        worker = self.start(command, self._nursery, **settings)
        if wait:
            worker.wait_for("serving ")
        return worker

    def start_api(self, **settings: str) -> Process:
        """Starts a uvicorn on a free port; returns when it is ready."""
        port = free_port()
        command = [sys.executable, "-m", "uvicorn", "--factory", "api.main:create_app"]
        command += ["--port", str(port)]
        api = self.start(command, redis_url=self.redis_url, **settings)
        self.api_url = f"http://127.0.0.1:{port}"
        api.wait_for("Uvicorn running")
        return api

    def start(self, command: list[str], nursery: "Nursery | None" = None, **settings: str) -> Process:
        """Starts any program with the deployment's settings; with a `nursery`, only `rq`."""
        environment = self._environment | {f"LORELAY_{name.upper()}": v for name, v in settings.items()}
        log = self._folder / f"process-{len(self._processes)}.log"
        if nursery is None:
            self._processes.append(Process(command, environment, log))
        else:
            self._processes.append(nursery.start(command[1:], DEFAULTS | environment, log))
        return self._processes[-1]

    def client(self, **options: object) -> openai.OpenAI:
        """An official client of the API."""
        http_client = httpx.Client(timeout=60, trust_env=False)
        defaults = {"api_key": "none", "max_retries": 0}
        self._clients.append(
            openai.OpenAI(base_url=f"{self.api_url}/v1", http_client=http_client, **(defaults | options))
        )
        return self._clients[-1]

    def num_live_workers(self, base: str) -> int:
        """The number of workers of a base whose lease has not run out."""
        with redis.Redis.from_url(self.redis_url) as connection:
            seconds, _ = connection.time()
            return connection.zcount(keys.workers(slug(base)), seconds * 1000, "+inf")

    def close(self) -> None:
        for client in self._clients:
            client.close()
        for process in self._processes:
            process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if error is not None:
            error.add_note("\n".join(process.output[-3000:] for process in self._processes))
