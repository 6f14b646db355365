"""Computations that run step by step, so that the event loop can serve other requests in between.

A computation is a generator, and each of its `yield`s ends a step. A step should take `STEP_S` or less.
"""

import asyncio
import time
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

Value = TypeVar("Value")
Item = TypeVar("Item")
Steps = Generator[None, None, Value]

STEP_S = 0.005
"""Time after which a computation lets the event loop serve other requests."""


def each(function: Callable[[Item], Value], items: Iterable[Item]) -> Steps[list[Value]]:
    """Calls `function` for each item, one per step, and returns the results."""
    results = []
    for item in items:
        results.append(function(item))
        yield
    return results


def run_at_once(steps: Steps[Value]) -> Value:
    """Runs a computation to its end without a pause."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


class StepRunner:
    """Runs computations in an event loop, but only one long computation at a time.

    A computation is long if it takes more than `STEP_S`. If several long computations ran at once, each would
    take `STEP_S` before the event loop served other requests again.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._turn = asyncio.Lock()

    async def run(self, steps: Steps[Value], *, is_long: bool) -> Value:
        """Runs a computation to its end, and pauses whenever it has run for `STEP_S`.

        If `is_long` is true, even the first step waits until no other long computation runs.
        """
        if not is_long:
            ends, value = self._run_for_a_while(steps)
            if ends:
                return value  # type: ignore[return-value]
        async with self._turn:
            while True:
                ends, value = self._run_for_a_while(steps)
                await asyncio.sleep(0)
                if ends:
                    return value  # type: ignore[return-value]

    def _run_for_a_while(self, steps: Steps[Value]) -> tuple[bool, Value | None]:
        """Runs steps for `STEP_S`; returns (True, value) if the computation has ended, else (False, None)."""
        until = self._clock() + STEP_S
        try:
            next(steps)
            while self._clock() < until:
                next(steps)
        except StopIteration as end:
            return True, end.value
        return False, None
