"""Starts child processes and receives signals, for `lorelay serve`.

Every child leads a separate process group, so that a Ctrl-C in the terminal reaches only `lorelay serve`. On
Linux, a child gets SIGTERM when its parent dies. The signal handlers themselves do nothing: `Signals.wait`
returns the signals that were received.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol, Self

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class ChildSpec:
    """The description of a child process that is to be kept running."""

    name: str
    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of the child, in addition to the variables of its parent."""
    cwd: Path | None = None
    pass_fds: tuple[int, ...] = ()
    stop_limit_s: float = 10.0
    """Maximum time from SIGTERM to the end of the child; after this time, the child is killed."""
    hurry_signal: int = signal.SIGTERM
    """Signal that makes the child end sooner, sent after a SIGTERM."""


def start_process(spec: ChildSpec, output: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
    """Starts a process in a separate group; the new process ends when this one ends.

    The caller must have only one thread, because Python code runs between fork and exec. `output` receives
    stdout and stderr; if it is None, the new process shares stdout and stderr with this one.
    """
    parent_pid, libc = os.getpid(), _libc()
    return subprocess.Popen(
        spec.command,
        env={**os.environ, **spec.env},
        cwd=spec.cwd,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        pass_fds=spec.pass_fds,
        process_group=0,
        preexec_fn=lambda: _end_with_parent(libc, parent_pid),  # noqa: PLW1509
    )


class SignalSource(Protocol):
    """The interface through which the supervisor waits for signals."""

    def wait(self, timeout_s: float) -> list[int]:
        """Waits up to `timeout_s` for a signal; returns the signals that have come, possibly none."""


class Signals:
    """A context manager for the main thread that collects SIGTERM, SIGINT, SIGHUP and SIGCHLD."""

    def __enter__(self) -> Self:
        self._read_fd, self._write_fd = os.pipe()
        os.set_blocking(self._read_fd, False)
        os.set_blocking(self._write_fd, False)
        self._old_wakeup_fd = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        wanted = [*STOP_SIGNALS, signal.SIGCHLD]
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # started by nohup
            wanted.remove(signal.SIGHUP)
        self._old_handlers = {number: signal.signal(number, lambda *_: None) for number in wanted}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wakeup_fd)
        os.close(self._read_fd)
        os.close(self._write_fd)

    def wait(self, timeout_s: float) -> list[int]:
        """Waits up to `timeout_s` for a signal; returns the signals that have come, possibly none."""
        if not select.select([self._read_fd], [], [], max(0.0, timeout_s))[0]:
            return []
        return list(os.read(self._read_fd, 4096))


def describe_exit(status: int) -> str:
    """Describes an exit status of `subprocess` in words."""
    if status >= 0:
        return f"ended with exit code {status}"
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(-status).name}"
    return f"was ended by signal {-status}"


def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def _end_with_parent(libc: ctypes.CDLL | None, parent_pid: int) -> None:
    """Asks the kernel for a SIGTERM when the parent dies; runs in the child, before the child's program."""
    if libc is None:
        return
    libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    # If the parent died before the call above, no signal will ever come.
    if os.getppid() != parent_pid:
        os._exit(1)
