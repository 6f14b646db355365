"""The benchmark's measurements, one table row each, with their limits and aims."""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


@dataclass(frozen=True)
class Goal:
    """A measurement to make: its title, the limit that its result must reach, and the aim."""

    key: str
    """Name of the measurement, as `--only` takes it."""
    title: str
    must: float
    aim: float
    unit: str = ""
    less_is_better: bool = False


class Verdict(StrEnum):
    """The outcome of a measurement: it reaches the aim, only the limit, or neither of the two."""

    AIM = "aim"
    MUST = "ok"
    SHORT = "short"
    NONE = ""


class Figure(NamedTuple):
    """The result of the measurement named `key`; its value is None if the measurement failed."""

    key: str
    value: float | None
    detail: str = ""
    """The absolute values behind a ratio, or the reason why there is no value."""
    failed: bool = False


@dataclass(frozen=True)
class Row:
    """A row of the table: a goal and the result of its measurement."""

    goal: Goal
    figure: Figure

    @property
    def verdict(self) -> Verdict:
        """The result of comparing the figure with its goal."""
        if self.figure.value is None:
            return Verdict.NONE
        if self._reaches(self.goal.aim):
            return Verdict.AIM
        return Verdict.MUST if self._reaches(self.goal.must) else Verdict.SHORT

    @property
    def shown(self) -> str:
        """The figure with its unit, or `-` without a value."""
        value = self.figure.value
        if value is None:
            return "-"
        digits = 0 if value >= 100 else 1 if value >= 10 else 2
        return f"{value:.{digits}f} {self.goal.unit}".rstrip()

    def share(self, value: float) -> float:
        """Returns a value relative to the row's limit, so that a higher result is better in every row."""
        must = self.goal.must
        if not self.goal.less_is_better:
            return value / must
        return must / value if value else math.inf

    def _reaches(self, mark: float) -> bool:
        value = self.figure.value
        assert value is not None
        return value <= mark if self.goal.less_is_better else value >= mark


def goals(*, has_compiler: bool) -> list[Goal]:
    """Returns all goals in the order of the table; two of them have a lower `must` without a C++ compiler."""
    base_must, mixed_must = (0.31, 0.21) if has_compiler else (0.22, 0.16)
    return [
        Goal("base", "base only, 16 at a time", base_must, 0.40, "F(16)"),
        Goal("mixed", "8 rank-16 adapters on all seven projections, mixed", mixed_must, 0.30, "F(16)"),
        Goal("mixed-base", "the same ÷ base only", 0.65, 0.78),
        Goal("many-base", "64 rank-8 adapters on q and v, 64 at a time ÷ base only", 0.85, 0.95),
        Goal("stream", "one stream", 0.60, 0.80, "F(1)"),
        _less("ttft", "time to first token p50, mixed, 16 at a time", 0.8, 0.5, "s"),
        _less("gap", "longest inter-token latency while 16 prompts of 1,000 tokens arrive ÷ median", 5, 2),
        Goal("tax", "service ÷ engine driven directly in process", 0.75, 0.90),
        _less("pickup", "time to first token added by API, Redis and claim; idle, p50", 8, 3, "ms"),
        _less("cached", "time to first token added by an adapter in host memory", 30, 5, "ms"),
        _less("disk", "time to first token added by an adapter on disk", 150, 50, "ms"),
        Goal("thousand", "1,000 rank-8 adapters, Zipf over 100 ÷ one adapter", 0.70, 0.90),
        Goal("relay", "relay alone, 256 streams: tokens per CPU-second ÷ bare Starlette", 0.35, 0.60),
        Goal("workers", "4 workers ÷ 1 worker, batch 4, 20 ms a step", 3.8, 3.95),
        _less("engine-redis", "CPU time of the engine's thread in Redis code, a step", 0, 0, "ms"),
        _less("append", "append script at batch 32, p50", 1.0, 0.5, "ms"),
    ]


def _less(key: str, title: str, must: float, aim: float, unit: str = "") -> Goal:
    return Goal(key, title, must, aim, unit, less_is_better=True)
