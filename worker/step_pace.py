"""How many prompt tokens a step may compute, learned from how long the steps before it took."""

import time
from collections.abc import Callable

MIN_STRETCH = 2.0
MAX_STRETCH = 3.0
"""A step with prompt tokens takes this many times as long as one without: at least, so that prompts get on
beside streams that are slow anyway, and at most, so that the readers of fast ones don't notice."""
FIRST_CHUNK_TOKENS = 128
"""While nothing is known."""
MIN_CHUNK_TOKENS = 32
_ROWS_UNIT = 16
_GAIN = 0.3
_MAX_SURPRISE = 2.0


class StepPace:
    """Keeps steps near `step_target_ms` by the number of prompt tokens in them.

    Steps without prompt tokens tell what running rows cost: a fixed time and one per row. What a step with
    prompt tokens takes beyond that is their cost. Each measurement moves its estimate part of the way.
    """

    def __init__(self, step_target_ms: float, clock: Callable[[], float] = time.perf_counter) -> None:
        """`clock` counts seconds."""
        self._step_target_ms = step_target_ms
        self._clock = clock
        self._started_s = 0.0
        self._fixed_ms = 0.0
        self._ms_per_unit = 0.0
        """Of `_ROWS_UNIT` rows."""
        self._ms_per_token: float | None = None

    def start_step(self) -> None:
        """The time of the next recorded step counts from now."""
        self._started_s = self._clock()

    def num_prefill_tokens(self, num_rows: int) -> int:
        """The prompt tokens that fit into a step beside `num_rows` running rows."""
        if self._ms_per_token is None:
            return FIRST_CHUNK_TOKENS
        rows_ms = self._rows_ms(num_rows)
        target_ms = max(self._step_target_ms, MIN_STRETCH * rows_ms)
        if num_rows and rows_ms:
            target_ms = min(target_ms, MAX_STRETCH * rows_ms)
        return max(MIN_CHUNK_TOKENS, int((target_ms - rows_ms) / max(self._ms_per_token, 1e-6)))

    def record(self, num_rows: int, num_prefill_tokens: int) -> None:
        """Learns from the step that ends now."""
        took_ms = (self._clock() - self._started_s) * 1e3
        rows_ms = self._rows_ms(num_rows)
        if num_prefill_tokens:
            ms_per_token = max(0.0, took_ms - rows_ms) / num_prefill_tokens
            self._ms_per_token = _approach(self._ms_per_token, ms_per_token)
        else:
            self._learn_rows(num_rows, _approach(rows_ms or None, took_ms) - rows_ms)

    def _rows_ms(self, num_rows: int) -> float:
        return self._fixed_ms + self._ms_per_unit * num_rows / _ROWS_UNIT

    def _learn_rows(self, num_rows: int, change_ms: float) -> None:
        """Changes the estimate for `num_rows` by `change_ms`, each part by its share (least mean squares)."""
        num_units = num_rows / _ROWS_UNIT
        change_ms /= 1 + num_units**2
        self._fixed_ms = max(0.0, self._fixed_ms + change_ms)
        self._ms_per_unit = max(0.0, self._ms_per_unit + change_ms * num_units)


def _approach(estimate: float | None, measured: float) -> float:
    """The estimate after a measurement.

    One far above it counts as twice as much: what else the machine did in that step says little about the
    next one.
    """
    if estimate is None:
        return measured
    return estimate + _GAIN * (min(measured, _MAX_SURPRISE * estimate) - estimate)
