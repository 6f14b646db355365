"""`rq worker` in half a second: forks of a process that has already imported torch and transformers.

They run `rq`'s own entry point with the same arguments and environment as when started from the shell; only
the imports are done before. Tests start dozens of workers, each of which would take four seconds.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.chaos import jumping_clock
from tests.deployment import ROOT, Process
from tests.waiting import wait_until

POLL_S = 0.02
START_LIMIT_S = 60


class ForkedProcess(Process):
    """A child of the nursery, with the methods of a process that was started from here."""

    def __init__(self, pid: int, log: Path, exit_codes: Mapping[int, int]) -> None:
        self._pid = pid
        self._log = log
        self._exit_codes = exit_codes

    @property
    def pid(self) -> int:
        return self._pid

    @property
    def is_running(self) -> bool:
        return self.pid not in self._exit_codes

    def send(self, signal_no: int) -> None:
        if self.is_running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal_no)

    def wait(self, timeout_s: float = 30) -> int:
        wait_until(lambda: not self.is_running, timeout_s, f"the end of process {self.pid}")
        return self._exit_codes[self.pid]

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.wait()


class Nursery:
    """The process that workers are forked from. A `with` statement starts and ends it."""

    def __init__(self) -> None:
        self._exit_codes: dict[int, int] = {}
        self._lock = threading.Lock()
        self._pids: list[int] = []
        self._answered = threading.Semaphore(0)

    def start(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> ForkedProcess:
        """Starts `rq` with these arguments; its output goes to `log`."""
        log.touch()
        order = {"arguments": list(arguments), "environment": dict(environment), "log": str(log)}
        with self._lock:
            assert self._popen.stdin is not None
            self._popen.stdin.write(json.dumps(order) + "\n")
            self._popen.stdin.flush()
            assert self._answered.acquire(timeout=START_LIMIT_S), "the nursery does not answer"
            return ForkedProcess(self._pids[-1], log, self._exit_codes)

    def __enter__(self) -> "Nursery":
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("LORELAY_", "RQ_"))}
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "tests.forked"],
            env=inherited | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # A Ctrl-C is for pytest, which then ends the workers one by one.
        )
        self._reader = threading.Thread(target=self._read, name="nursery")
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._popen.stdin is not None
        self._popen.stdin.close()
        self._popen.wait(START_LIMIT_S)
        self._reader.join()
        assert self._popen.stdout is not None
        self._popen.stdout.close()

    def _read(self) -> None:
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            message = json.loads(line)
            if "exit_code" in message:
                self._exit_codes[message["pid"]] = message["exit_code"]
            else:
                self._pids.append(message["pid"])
                self._answered.release()


def main() -> None:
    """Runs the nursery: forks on orders from stdin, reports pids and exit codes, at last kills the rest."""
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import worker.model.model_runner  # noqa: F401

    children: set[int] = set()
    buffer = b""
    while True:
        if select.select([0], [], [], POLL_S)[0]:
            data = os.read(0, 65536)
            if not data:
                break
            *orders, buffer = (buffer + data).split(b"\n")
            for order in orders:
                pid = _fork(json.loads(order))
                children.add(pid)
                _tell(pid=pid)
        _reap(children, os.WNOHANG)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    while children:
        _reap(children, 0)


def _fork(order: dict[str, object]) -> int:
    if pid := os.fork():
        return pid
    exit_code = 1
    try:
        exit_code = _become(**order)  # type: ignore[arg-type]
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)


def _become(arguments: list[str], environment: dict[str, str], log: str) -> int:
    """Runs `rq` in the child, with its own output, arguments and environment; returns its exit code."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    sys.argv = ["rq", *arguments]
    from rq.cli import main as rq_main

    jumping_clock.install()
    try:
        rq_main()
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _reap(children: set[int], options: int) -> None:
    for pid in list(children):
        found, status = os.waitpid(pid, options)
        if found:
            children.remove(pid)
            _tell(pid=pid, exit_code=os.waitstatus_to_exitcode(status))


def _tell(**message: int) -> None:
    with contextlib.suppress(BrokenPipeError):
        os.write(1, json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    main()
