"""The number of prompt tokens that a step may compute, learned from the duration of earlier steps."""

import math
import time
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

MIN_STRETCH = 2.0
MAX_STRETCH = 2.5
"""Bounds of a step with prompt tokens, as multiples of one without: at least so long, so that prompts get on
beside streams that are slow anyway; at most so long, so that readers of fast streams don't notice."""
FIRST_CHUNK_TOKENS = 128
"""Assumed number of prompt tokens that fill a step, before anything was measured."""
MAX_NUM_CHUNK_STEPS = 32
"""Steps with prompt tokens after which one runs without them, to measure the cost of rows alone again."""
_GATHER_TOKENS = 8
"""Reading the cache for a chunk costs as much as the attention of this number of its own tokens."""
_GAIN = 0.3
_MAX_DECODES_SURPRISE, _MAX_CHUNKS_SURPRISE = 1.2, 2.0
"""Largest measurement that is believed, as a multiple of the estimate. A rise in the cost of chunks makes
them smaller and is learned quickly. A rise in the cost of rows would make chunks larger just when the machine
is busy, and is learned slowly."""


class Chunk(NamedTuple):
    """A part of a prompt that a step computes."""

    num_tokens: int
    num_tokens_before: int
    """Tokens of its sequence that the cache has already."""

    @property
    def num_pairs(self) -> float:
        """Pairs of a token of the chunk and a token that it attends to."""
        return (self.num_tokens + _GATHER_TOKENS) * (self.num_tokens_before + self.num_tokens / 2)


class StepPace:
    """Keeps steps near `step_target_ms` by the number of prompt tokens in them.

    Steps without prompt tokens measure the cost of running rows: a fixed time and one per row. The rest of a
    step with prompt tokens is the cost of chunks: a fixed time, one per token, and one per pair of a token
    and another that it attends to. Therefore the end of a long prompt costs more than its beginning.
    """

    def __init__(self, step_target_ms: float, clock: Callable[[], float] = time.perf_counter) -> None:
        """`clock` counts seconds."""
        self._step_target_ms = step_target_ms
        self._clock = clock
        self._started_s = 0.0
        self._decodes = _Cost((1, 16), (0, 0), _MAX_DECODES_SURPRISE)
        self._chunks = _Cost((1, FIRST_CHUNK_TOKENS, 1 << 16), (0, step_target_ms, 0), _MAX_CHUNKS_SURPRISE)
        self._num_chunk_steps = 0
        """Steps with prompt tokens since the last one without."""

    def start_step(self) -> None:
        """Starts the clock of the next recorded step."""
        self._started_s = self._clock()

    def prefill_ms(self, num_decodes: int) -> float:
        """The time for chunks in a step with `num_decodes` running rows; 0 means a step without chunks."""
        if num_decodes and self._num_chunk_steps >= MAX_NUM_CHUNK_STEPS:
            return 0.0
        decodes_ms = self._decodes.ms((1, num_decodes))
        target_ms = max(self._step_target_ms, MIN_STRETCH * decodes_ms)
        if num_decodes and decodes_ms:
            target_ms = min(target_ms, MAX_STRETCH * decodes_ms)
        return max(1e-6, target_ms - decodes_ms - self._chunks.ms((1, 0, 0)))

    def chunk_ms(self, chunk: Chunk) -> float:
        """The part of `prefill_ms` that a chunk takes."""
        return self._chunks.ms((0, chunk.num_tokens, chunk.num_pairs))

    def num_tokens(self, num_ms: float, num_tokens_before: int) -> float:
        """The size of the chunk that takes `num_ms`; below 1 if even one token takes longer."""
        per_token, per_pair = self._chunks.ms((0, 1, 0)), self._chunks.ms((0, 0, 1))
        # The n for which chunk_ms is num_ms: a root of q n² + p n = left.
        q = per_pair / 2
        p = per_token + per_pair * (num_tokens_before + _GATHER_TOKENS / 2)
        left = num_ms - per_pair * _GATHER_TOKENS * num_tokens_before
        if left <= 0 or not p:
            return 0 if left <= 0 else math.inf
        return 2 * left / (p + math.sqrt(p * p + 4 * q * left))

    def record(self, num_decodes: int, chunks: Collection[Chunk]) -> None:
        """Learns from the step that ends now."""
        took_ms = (self._clock() - self._started_s) * 1e3
        if not chunks:
            self._decodes.learn((1, num_decodes), took_ms)
            self._num_chunk_steps = 0
            return
        self._num_chunk_steps += 1
        num_tokens = sum(chunk.num_tokens for chunk in chunks)
        num_pairs = sum(chunk.num_pairs for chunk in chunks)
        self._chunks.learn((1, num_tokens, num_pairs), max(0.0, took_ms - self._decodes.ms((1, num_decodes))))


class _Cost:
    """A linear estimate: milliseconds as a sum of amounts times prices. Learned by least mean squares."""

    def __init__(self, units: Sequence[float], guess_ms: Sequence[float], max_surprise: float) -> None:
        """`units` are typical amounts; their prices, at first `guess_ms`, change at the same rate."""
        self._units = units
        self._unit_ms = list(guess_ms)
        self._max_surprise = max_surprise
        self._is_guess = True

    def ms(self, amounts: Sequence[float]) -> float:
        """The estimate for these amounts."""
        return sum(map(math.prod, zip(self._shares(amounts), self._unit_ms, strict=True)))

    def learn(self, amounts: Sequence[float], measured_ms: float) -> None:
        """Moves the estimate part of the way towards a measurement, the first time all of the way.

        A measurement far above the estimate counts as `max_surprise` times the estimate, because other work
        of the machine in that step tells little about the next one.
        """
        estimate_ms, is_guess = self.ms(amounts), self._is_guess
        self._is_guess = False
        if is_guess and estimate_ms:
            self._unit_ms = [ms * measured_ms / estimate_ms for ms in self._unit_ms]
            return
        change_ms = measured_ms
        if estimate_ms:
            # One half of the change scales all prices, as if the device had become slower or faster ...
            change_ms = _GAIN / 2 * (min(measured_ms, self._max_surprise * estimate_ms) - estimate_ms)
            self._unit_ms = [ms * (1 + change_ms / estimate_ms) for ms in self._unit_ms]
        # ... and the other half changes the proportions of the prices.
        shares = self._shares(amounts)
        change_ms /= sum(share * share for share in shares)
        pairs = zip(self._unit_ms, shares, strict=True)
        self._unit_ms = [max(0.0, ms + change_ms * share) for ms, share in pairs]

    def _shares(self, amounts: Sequence[float]) -> list[float]:
        return [amount / unit for amount, unit in zip(amounts, self._units, strict=True)]
