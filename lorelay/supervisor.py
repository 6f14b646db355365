"""Starts processes, restarts those that die, and stops them in order.

One thread, no handlers that do anything: signals arrive as values of `Signals.wait`, and `Supervisor.turn`
is one round of its loop. Every child leads a process group of its own, so a Ctrl-C in the terminal reaches
only the supervisor; on Linux a child gets SIGTERM when its supervisor dies.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol, Self

HURRY_LIMIT_S = 5.0
"""How long a child may take once the user asked to stop a second time."""
POLL_S = 0.25
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1


class ChildFailed(Exception):
    """A child ended before everything was ready."""

    def __init__(self, name: str, exit_code: int, reason: str) -> None:
        self.name = name
        self.exit_code = exit_code
        super().__init__(f"{name} {reason}")


@dataclass(frozen=True)
class ChildSpec:
    """A process to keep running."""

    name: str
    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    """Variables beside the supervisor's own."""
    cwd: Path | None = None
    pass_fds: tuple[int, ...] = ()
    stop_limit_s: float = 10.0
    """How long it may take from SIGTERM to its end; then it is killed."""
    hurry_signal: int = signal.SIGTERM
    """What makes it end sooner after a SIGTERM."""


def start_process(spec: ChildSpec, output: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
    """Starts a process in a group of its own that ends with this one; for programs with one thread.

    `output`: where all that it writes goes, by default where this process writes.
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


class Backoff:
    """The wait before a restart: doubles from `first_s` to `max_s`; starts over after a life of `reset_s`."""

    def __init__(self, first_s: float = 0.5, max_s: float = 30.0, reset_s: float = 60.0) -> None:
        self._first_s = first_s
        self._max_s = max_s
        self._reset_s = reset_s
        self._next_s = first_s

    def next_delay_s(self, lived_s: float) -> float:
        """The wait after a life of `lived_s`."""
        delay_s = self._first_s if lived_s >= self._reset_s else self._next_s
        self._next_s = min(delay_s * 2, self._max_s)
        return delay_s


class SignalSource(Protocol):
    """Where a supervisor waits."""

    def wait(self, timeout_s: float) -> list[int]:
        """The signals that came, at once when there is one; none after `timeout_s`."""


class Signals:
    """SIGTERM, SIGINT, SIGHUP and SIGCHLD as values; a context manager of the main thread."""

    def __enter__(self) -> Self:
        self._read_fd, self._write_fd = os.pipe()
        os.set_blocking(self._read_fd, False)
        os.set_blocking(self._write_fd, False)
        self._old_wakeup_fd = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        wanted = [*_STOP_SIGNALS, signal.SIGCHLD]
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup
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
        """The signals that came, at once when there is one; none after `timeout_s`."""
        if not select.select([self._read_fd], [], [], max(0.0, timeout_s))[0]:
            return []
        return list(os.read(self._read_fd, 4096))


class _Child:
    """One process, now running or waiting for its restart."""

    def __init__(self, spec: ChildSpec) -> None:
        self.spec = spec
        self.backoff = Backoff()
        self.process: subprocess.Popen[bytes] | None = None
        self.started_at = 0.0
        self.restart_at: float | None = None

    def start(self, now: float) -> None:
        self.restart_at, self.started_at = None, now
        self.process = start_process(self.spec)

    def reap(self) -> int | None:
        """The exit status when it has just ended; what it left behind in its group is killed."""
        if self.process is None or self.process.poll() is None:
            return None
        status = self.process.returncode
        self._kill_group()
        self.process = None
        return status

    def send(self, number: int) -> None:
        if self.process is not None:
            self.process.send_signal(number)

    def kill(self) -> None:
        if self.process is not None:
            self._kill_group()
            self.process.wait()
            self.process = None

    def _kill_group(self) -> None:
        assert self.process is not None
        # macOS answers EPERM for a group of zombies.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)


def say(line: str) -> None:
    """Tells the person at the terminal what happens."""
    sys.stdout.write(f"lorelay: {line}\n")
    sys.stdout.flush()


class Supervisor:
    """Keeps groups of processes running.

    Until `settled` is set, a child that ends is a failed start (`ChildFailed`); from then on it is restarted.
    Once `stop_asked` is set nothing is restarted any more.
    """

    def __init__(
        self,
        signals: SignalSource,
        *,
        clock: Callable[[], float] = time.monotonic,
        say: Callable[[str], None] = say,
    ) -> None:
        self._signals = signals
        self._clock = clock
        self._say = say
        self._groups: list[list[_Child]] = []
        self._num_hurries = 0
        self.settled = False
        self.stop_asked = False

    def start(self, *specs: ChildSpec) -> None:
        """Starts processes that belong together: `stop` ends them at the same time, later groups first."""
        group: list[_Child] = []
        self._groups.append(group)
        for spec in specs:
            child = _Child(spec)
            child.start(self._clock())
            group.append(child)

    def pids(self, *names: str) -> dict[str, int]:
        """The running children by name; all of them when no name is given."""
        return {
            child.spec.name: child.process.pid
            for child in self._children()
            if child.process is not None and (not names or child.spec.name in names)
        }

    def run_until(self, condition: Callable[[], bool], limit_s: float = float("inf")) -> bool:
        """Keeps the processes running until the condition holds; False: asked to stop, or past the limit.

        Raises:
            ChildFailed: a child ended before everything was ready.
        """
        deadline = self._clock() + limit_s
        while not self.stop_asked and self._clock() < deadline:
            if condition():
                return True
            self.turn()
        return False

    def run(self) -> None:
        """Keeps the processes running until asked to stop."""
        self.run_until(lambda: False)

    def turn(self) -> None:
        """One round: waits for a signal or the next restart, then does what is due."""
        due = [child.restart_at for child in self._children() if child.restart_at is not None]
        wait_s = min([POLL_S, *(at - self._clock() for at in due)])
        if any(number in _STOP_SIGNALS for number in self._signals.wait(wait_s)):
            self.stop_asked = True
            return
        for child in self._children():
            self._look_after(child)

    def stop(self) -> bool:
        """Ends all groups, the latest first, each child with SIGTERM; whether none had to be killed.

        A further SIGTERM or Ctrl-C hurries, a third one kills.
        """
        self.stop_asked = True
        was_clean = True
        while self._groups:
            was_clean &= self._stop_group(self._groups.pop())
        return was_clean

    def _children(self) -> list[_Child]:
        return [child for group in self._groups for child in group]

    def _look_after(self, child: _Child) -> None:
        now = self._clock()
        if child.restart_at is not None and now >= child.restart_at:
            self._say(f"starting {child.spec.name} again")
            child.start(now)
            return
        status = child.reap()
        if status is None:
            return
        reason = describe_exit(status)
        if not self.settled:
            raise ChildFailed(child.spec.name, status if status > 0 else 1, f"{reason} before it was ready")
        delay_s = child.backoff.next_delay_s(now - child.started_at)
        child.restart_at = now + delay_s
        self._say(f"{child.spec.name} {reason}; starting it again in {delay_s:g} s")

    def _stop_group(self, group: list[_Child]) -> bool:
        running = [child for child in group if child.process is not None]
        if not running:
            return True
        started_at, was_clean = self._clock(), True
        self._say(f"stopping {', '.join(child.spec.name for child in running)}")
        for child in running:
            child.send(signal.SIGTERM)
        hurry_at = started_at if self._num_hurries else None
        while running:
            hurry_at = self._wait_hurried(running, hurry_at)
            running = [child for child in running if child.reap() is None]
            for child in running:
                if self._is_over(child, started_at, hurry_at):
                    self._say(f"{child.spec.name} did not end in time: killed")
                    child.kill()
                    was_clean = False
            running = [child for child in running if child.process is not None]
        return was_clean

    def _wait_hurried(self, running: list[_Child], hurry_at: float | None) -> float | None:
        """Waits a moment; passes a further request to stop on. Returns since when there is one."""
        received = self._signals.wait(POLL_S)
        num_new = sum(number in _STOP_SIGNALS for number in received)
        if num_new and hurry_at is None:
            self._say("hurrying")
            hurry_at = self._clock()
        self._num_hurries += num_new
        if hurry_at is not None:
            for child in running:
                child.send(child.spec.hurry_signal)
        return hurry_at

    def _is_over(self, child: _Child, started_at: float, hurry_at: float | None) -> bool:
        now = self._clock()
        is_hurried_enough = hurry_at is not None and now >= hurry_at + HURRY_LIMIT_S
        return self._num_hurries > 1 or is_hurried_enough or now >= started_at + child.spec.stop_limit_s


def describe_exit(status: int) -> str:
    """An exit status of `subprocess` in words."""
    if status >= 0:
        return f"ended with exit code {status}"
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(-status).name}"
    return f"was ended by signal {-status}"


def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def _end_with_parent(libc: ctypes.CDLL | None, parent_pid: int) -> None:
    """Runs in the new process, before its program: SIGTERM when the supervisor dies."""
    if libc is None:
        return
    libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    # The supervisor may have died before the call above.
    if os.getppid() != parent_pid:
        os._exit(1)
