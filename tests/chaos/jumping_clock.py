"""A wall clock that jumps while a process runs: `python -m tests.chaos.jumping_clock MODULE ARGUMENTS`.

The clock that Python code reads jumps by an hour, forward at SIGUSR1 and back at SIGUSR2. Monotonic clocks
are left alone, as they are by a change of a machine's clock.
"""

import datetime
import runpy
import signal
import sys
import time
from types import FrameType

JUMP_S = 3600
FORWARD, BACK = signal.SIGUSR1, signal.SIGUSR2
_real, _real_time, _real_time_ns = datetime.datetime, time.time, time.time_ns
_jumps: list[int] = []
"""Seconds of each jump so far."""


class _AlsoReal(type):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, _real)


class _Jumping(_real, metaclass=_AlsoReal):
    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> "datetime.datetime":  # type: ignore[override]
        """Returns the date by the clock that jumps."""
        return _real.now(tz) + datetime.timedelta(seconds=sum(_jumps))


def install() -> None:
    """Replaces the clock in the standard library, and in those modules of RQ that are imported already."""
    signal.signal(FORWARD, _jump)
    signal.signal(BACK, _jump)
    time.time = lambda: _real_time() + sum(_jumps)
    time.time_ns = lambda: _real_time_ns() + sum(_jumps) * 10**9
    datetime.datetime = _Jumping  # type: ignore[misc]
    for name, module in list(sys.modules.items()):
        if name.startswith("rq.") and getattr(module, "datetime", None) is _real:
            module.datetime = _Jumping  # type: ignore[attr-defined]


def _jump(signum: int, frame: FrameType | None) -> None:
    _jumps.append(JUMP_S if signum == FORWARD else -JUMP_S)


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    install()
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
