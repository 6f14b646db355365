"""Exponential backoff between retries."""

from collections.abc import Iterator

FIRST_PAUSE_S = 0.05
MAX_PAUSE_S = 1.0


def backoff() -> Iterator[float]:
    """Yields pauses (s) without end, each twice as long as the previous pause, up to `MAX_PAUSE_S`."""
    pause_s = FIRST_PAUSE_S
    while True:
        yield pause_s
        pause_s = min(pause_s * 2, MAX_PAUSE_S)
