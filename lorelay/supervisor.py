"""Starts processes, restarts processes that die, and stops them all in order.

The supervisor runs in one thread, in a loop. Each round of the loop (`Supervisor.turn`) waits for a signal or
for the time of the next restart.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from lorelay.processes import STOP_SIGNALS, ChildSpec, SignalSource, describe_exit, start_process

HURRY_LIMIT_S = 5.0
"""Time that a child has to end after the user's second request to stop."""
POLL_S = 0.25


class ChildFailed(Exception):
    """A child process ended before the start was complete."""

    def __init__(self, name: str, exit_code: int, reason: str) -> None:
        self.name = name
        self.exit_code = exit_code
        super().__init__(f"{name} {reason}")


class Backoff:
    """The delay before a restart.

    The delay begins with `first_s` and doubles with each restart, up to `max_s`. If the child lived for
    `reset_s`, the delay begins with `first_s` again.
    """

    def __init__(self, first_s: float = 0.5, max_s: float = 30.0, reset_s: float = 60.0) -> None:
        self._first_s = first_s
        self._max_s = max_s
        self._reset_s = reset_s
        self._next_s = first_s

    def next_delay_s(self, lived_s: float) -> float:
        """Returns the delay before the restart of a child that lived for `lived_s`."""
        delay_s = self._first_s if lived_s >= self._reset_s else self._next_s
        self._next_s = min(delay_s * 2, self._max_s)
        return delay_s


class _Child:
    """A child process that is running or waits for its restart."""

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
        """Returns the exit status if the child has just ended; kills the processes left in its group."""
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
    """Prints a line for the person at the terminal."""
    sys.stdout.write(f"lorelay: {line}\n")
    sys.stdout.flush()


class Supervisor:
    """Keeps groups of processes running.

    If a child ends before `settle` is called, the start has failed (`ChildFailed`). A child that ends later
    is restarted, until a signal asks to stop.
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
        self._is_settled = False
        self._is_stopping = False

    @property
    def is_stopping(self) -> bool:
        """True once a signal has asked to stop. No child is restarted after that."""
        return self._is_stopping

    @property
    def pids(self) -> dict[str, int]:
        """The process ids of the running children, by their names."""
        return {child.spec.name: child.process.pid for child in self._children() if child.process is not None}

    def start(self, *specs: ChildSpec) -> None:
        """Starts `specs` as one group.

        `stop` ends the groups in reverse order of their start, and all processes of a group together."""
        group: list[_Child] = []
        self._groups.append(group)
        for spec in specs:
            child = _Child(spec)
            child.start(self._clock())
            group.append(child)

    def settle(self) -> None:
        """Declares the start successful. Children that end later are restarted."""
        self._is_settled = True

    def run_until(self, condition: Callable[[], bool], limit_s: float = float("inf")) -> bool:
        """Keeps the processes running until the condition holds.

        Returns False if a signal asks to stop, or `limit_s` passes, before the condition holds.

        Raises:
            ChildFailed: a child ended before everything was ready.
        """
        deadline = self._clock() + limit_s
        while not self._is_stopping and self._clock() < deadline:
            if condition():
                return True
            self.turn()
        return False

    def run(self) -> None:
        """Keeps the processes running until a signal asks to stop."""
        self.run_until(lambda: False)

    def turn(self) -> None:
        """Waits for a signal or the next restart, then restarts or reaps each child that needs it."""
        due = [child.restart_at for child in self._children() if child.restart_at is not None]
        wait_s = min([POLL_S, *(at - self._clock() for at in due)])
        if any(number in STOP_SIGNALS for number in self._signals.wait(wait_s)):
            self._is_stopping = True
            return
        for child in self._children():
            self._look_after(child)

    def stop(self) -> bool:
        """Ends all groups with SIGTERM, the newest group first; returns False if a child had to be killed.

        A second SIGTERM or Ctrl-C shortens the time that children have to end. A third one kills them.
        """
        self._is_stopping = True
        stop = _Stop(self._signals, self._clock, self._say)
        was_clean = True
        while self._groups:
            was_clean &= stop.end(self._groups.pop())
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
        if not self._is_settled:
            raise ChildFailed(child.spec.name, status if status > 0 else 1, f"{reason} before it was ready")
        delay_s = child.backoff.next_delay_s(now - child.started_at)
        child.restart_at = now + delay_s
        self._say(f"{child.spec.name} {reason}; starting it again in {delay_s:g} s")


class _Stop:
    """Ends groups of children one after another; each further request to stop shortens their time."""

    def __init__(self, signals: SignalSource, clock: Callable[[], float], say: Callable[[str], None]) -> None:
        self._signals = signals
        self._clock = clock
        self._say = say
        self._num_hurries = 0
        """Number of requests to stop after the first request."""
        self._hurried_at: float | None = None
        """Time at which the current group was told to hurry; None if it was not told so."""

    def end(self, group: list[_Child]) -> bool:
        """Ends a group with SIGTERM; returns False if a child had to be killed."""
        running = [child for child in group if child.process is not None]
        if not running:
            return True
        started_at, was_clean = self._clock(), True
        self._hurried_at = started_at if self._num_hurries else None
        self._say(f"stopping {', '.join(child.spec.name for child in running)}")
        for child in running:
            child.send(signal.SIGTERM)
        while running:
            self._wait(running)
            running = [child for child in running if child.reap() is None]
            for child in [child for child in running if self._is_overdue(child, started_at)]:
                self._say(f"{child.spec.name} did not end in time: killed")
                child.kill()
                running.remove(child)
                was_clean = False
        return was_clean

    def _wait(self, running: list[_Child]) -> None:
        """Waits up to `POLL_S`; once the user has asked to stop again, tells the children to end sooner."""
        received = self._signals.wait(POLL_S)
        num_new = sum(number in STOP_SIGNALS for number in received)
        if num_new and self._hurried_at is None:
            self._say("asked to stop again: stopping faster")
            self._hurried_at = self._clock()
        self._num_hurries += num_new
        if self._hurried_at is not None:
            for child in running:
                child.send(child.spec.hurry_signal)

    def _is_overdue(self, child: _Child, started_at: float) -> bool:
        now = self._clock()
        is_hurried_enough = self._hurried_at is not None and now >= self._hurried_at + HURRY_LIMIT_S
        return self._num_hurries > 1 or is_hurried_enough or now >= started_at + child.spec.stop_limit_s
