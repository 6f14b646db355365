"""Decides how many prompt tokens a step may compute, from the durations of earlier steps."""

import math
import time
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

MIN_STRETCH = 2.0
MAX_STRETCH = 2.5
"""Minimum and maximum duration of a step with prompt tokens, as multiples of a step without any. The minimum
keeps prompts from starving where decodes alone take as long as the target; the maximum keeps the
inter-token latency of fast streams low."""
FIRST_CHUNK_TOKENS = 128
"""Number of prompt tokens that are assumed to fill a step before any step was measured."""
MAX_NUM_CHUNK_STEPS = 32
"""Number of steps with prompt tokens after which a step without any measures the cost of decodes again."""
_GATHER_TOKENS = 8
"""Number of tokens added to a chunk when its attention is estimated, for the cost of reading the cache."""
_GAIN = 0.3
_MAX_DECODES_SURPRISE, _MAX_CHUNKS_SURPRISE = 1.2, 2.0
"""Upper limit of a measurement, as a multiple of the estimate; higher measurements count as this limit. A
higher cost of chunks makes chunks smaller and is learned quickly. A higher cost of decodes makes chunks
larger and is learned slowly, because another process may merely have been busy during one step."""


class Chunk(NamedTuple):
    """A part of a prompt that a step computes."""

    num_tokens: int
    num_tokens_before: int
    """Number of the sequence's tokens before the chunk, which are in the cache already."""

    @property
    def num_pairs(self) -> float:
        """Approximate number of attention pairs (a token of the chunk and a token that it attends to)."""
        return (self.num_tokens + _GATHER_TOKENS) * (self.num_tokens_before + self.num_tokens / 2)


class StepPace:
    """Keeps the duration of steps near `step_target_ms` by limiting the number of prompt tokens per step.

    The cost of decodes is a fixed time plus a time per decoding sequence. Steps without prompt tokens measure
    this cost. The cost of chunks is a fixed time, plus a time per token, plus a time per attention pair.
    Steps with prompt tokens measure the sum of both costs. A chunk at the end of a long prompt costs more
    than a chunk at its beginning, because it has more attention pairs.
    """

    def __init__(self, step_target_ms: float, clock: Callable[[], float] = time.perf_counter) -> None:
        """Starts with guessed costs; `clock` returns seconds."""
        self._step_target_ms = step_target_ms
        self._clock = clock
        self._started_s = 0.0
        self._decodes = _Cost((1, 16), (0, 0), _MAX_DECODES_SURPRISE)
        self._chunks = _Cost((1, FIRST_CHUNK_TOKENS, 1 << 16), (0, step_target_ms, 0), _MAX_CHUNKS_SURPRISE)
        self._num_chunk_steps = 0
        """Number of steps with prompt tokens since the last step without prompt tokens."""

    def start_step(self) -> None:
        """Begins to measure a step; the next call of `record` ends the measurement."""
        self._started_s = self._clock()

    def prefill_ms(self, num_decodes: int) -> float:
        """Returns the milliseconds that chunks may take in a step with these decodes; 0 forbids chunks."""
        if num_decodes and self._num_chunk_steps >= MAX_NUM_CHUNK_STEPS:
            return 0.0
        decodes_ms = self._decodes.ms((1, num_decodes))
        target_ms = max(self._step_target_ms, MIN_STRETCH * decodes_ms)
        if num_decodes and decodes_ms:
            target_ms = min(target_ms, MAX_STRETCH * decodes_ms)
        return max(1e-6, target_ms - decodes_ms - self._chunks.ms((1, 0, 0)))

    def chunk_ms(self, chunk: Chunk) -> float:
        """Returns the estimated milliseconds for a chunk, which count against `prefill_ms`."""
        return self._chunks.ms((0, chunk.num_tokens, chunk.num_pairs))

    def num_tokens(self, num_ms: float, num_tokens_before: int) -> float:
        """Returns how many tokens a chunk of `num_ms` may have; less than 1 if one token takes longer."""
        per_token, per_pair = self._chunks.ms((0, 1, 0)), self._chunks.ms((0, 0, 1))
        # Solves chunk_ms = num_ms for the number of tokens n: the positive root of q n² + p n = left.
        q = per_pair / 2
        p = per_token + per_pair * (num_tokens_before + _GATHER_TOKENS / 2)
        left = num_ms - per_pair * _GATHER_TOKENS * num_tokens_before
        if left <= 0 or not p:
            return 0 if left <= 0 else math.inf
        return 2 * left / (p + math.sqrt(p * p + 4 * q * left))

    def record(self, num_decodes: int, chunks: Collection[Chunk]) -> None:
        """Updates the estimates from the step that ends now."""
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
    """A linear cost model: milliseconds = sum of amounts x prices. Least mean squares learns the prices."""

    def __init__(self, units: Sequence[float], guess_ms: Sequence[float], max_surprise: float) -> None:
        """`units`: typical amounts.

        `guess_ms`: guesses of the costs of these amounts, until they are measured.
        """
        self._units = units
        self._unit_ms = list(guess_ms)
        self._max_surprise = max_surprise
        self._is_guess = True

    def ms(self, amounts: Sequence[float]) -> float:
        """Returns the estimated milliseconds for these amounts."""
        return sum(map(math.prod, zip(self._shares(amounts), self._unit_ms, strict=True)))

    def learn(self, amounts: Sequence[float], measured_ms: float) -> None:
        """Moves the estimate partly towards a measurement; the first measurement replaces the estimate.

        A measurement far above the estimate counts as only `max_surprise` times the estimate, because other
        work on the machine has probably caused it.
        """
        estimate_ms, is_guess = self.ms(amounts), self._is_guess
        self._is_guess = False
        if is_guess and estimate_ms:
            self._unit_ms = [ms * measured_ms / estimate_ms for ms in self._unit_ms]
            return
        change_ms = measured_ms
        if estimate_ms:
            # One half of the change scales all prices, as if the device had become slower or faster.
            change_ms = _GAIN / 2 * (min(measured_ms, self._max_surprise * estimate_ms) - estimate_ms)
            self._unit_ms = [ms * (1 + change_ms / estimate_ms) for ms in self._unit_ms]
        # The other half (the whole change if the estimate was 0) changes the proportions of the prices.
        shares = self._shares(amounts)
        change_ms /= sum(share * share for share in shares)
        pairs = zip(self._unit_ms, shares, strict=True)
        self._unit_ms = [max(0.0, ms + change_ms * share) for ms, share in pairs]

    def _shares(self, amounts: Sequence[float]) -> list[float]:
        return [amount / unit for amount, unit in zip(amounts, self._units, strict=True)]
