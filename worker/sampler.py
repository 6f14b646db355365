"""From logits to tokens: greedy, or drawn with random numbers that depend on the request alone."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shared.messages import SamplingParams

MIN_TEMPERATURE = 1e-6
"""Smaller ones would divide by zero in float32; the result is greedy long before."""

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint32)
_NUM_ROUNDS = 10


class SamplingRow(NamedTuple):
    """How to pick the token of one row of logits."""

    params: SamplingParams
    choice: int
    """Index of the sequence within its request."""
    position: int
    """Output tokens before this one."""
    banned: Collection[int] = ()
    """Token ids that may not be picked."""


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[int | None]:
    """One token per row of `logits` (num_rows, vocab); None where a row has NaN or no finite largest entry.

    A row's token depends on its own logits and `SamplingRow` only, never on the other rows.
    """
    if logits.dtype != torch.float64:
        logits = logits.float()
    logits = _ban(logits, rows)
    largest, tokens = logits.max(dim=-1)  # (num_rows,), NaN if the row has one
    usable = largest.isfinite()
    plain = [n for n, row in enumerate(rows) if row.params.temperature > 0 and not _filters(row, logits)]
    filtered = [n for n, row in enumerate(rows) if row.params.temperature > 0 and _filters(row, logits)]
    for group, draw in ((plain, _draw), (filtered, _draw_filtered)):
        if group:
            index = torch.tensor(group, device=logits.device)
            chosen = [rows[n] for n in group]
            weights = _weights(logits[index], largest[index], chosen)
            tokens[index] = draw(weights, chosen)
    return [
        token if is_usable else None
        for token, is_usable in zip(tokens.tolist(), usable.tolist(), strict=True)
    ]


def uniforms(rows: Sequence[SamplingRow]) -> npt.NDArray[np.float64]:
    """One number in [0, 1) per row: Philox(key=seed, counter=(position, choice, 0, 0)), 53 bits."""
    counters = np.array([(row.position, row.choice, 0, 0) for row in rows], dtype=np.uint32)
    seeds = np.array([row.params.seed for row in rows], dtype=np.uint64)
    keys = np.stack([seeds & np.uint64(0xFFFFFFFF), seeds >> np.uint64(32)], axis=-1).astype(np.uint32)
    words = philox(counters, keys)
    high, low = words[:, 0] >> np.uint32(5), words[:, 1] >> np.uint32(6)  # 27 and 26 bits
    return np.asarray((high * 2.0**26 + low) / 2.0**53, dtype=np.float64)


def philox(counters: npt.NDArray[np.uint32], keys: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Philox-4x32-10 of each row: counters (n, 4) and keys (n, 2) to random words (n, 4).

    Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    c0, c1, c2, c3 = counters.T
    keys = keys.copy()
    for _ in range(_NUM_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ keys[:, 0], low1, high0 ^ c3 ^ keys[:, 1], low0
        keys += _WEYL
    return np.stack([c0, c1, c2, c3], axis=-1)


def _multiply(
    words: npt.NDArray[np.uint32], multiplier: np.uint64
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
    """High and low 32 bits of the products."""
    product = words.astype(np.uint64) * multiplier
    return (product >> np.uint64(32)).astype(np.uint32), product.astype(np.uint32)


def _ban(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    pairs = [(n, token_id) for n, row in enumerate(rows) for token_id in row.banned]
    if not pairs:
        return logits
    row_index, token_index = torch.tensor(pairs, device=logits.device).T
    return logits.index_put((row_index, token_index), logits.new_tensor(-torch.inf))


def _filters(row: SamplingRow, logits: Tensor) -> bool:
    return row.params.top_p < 1 or 0 < row.params.top_k < logits.shape[-1]


def _weights(logits: Tensor, largest: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """exp((logits - largest) / temperature): probabilities up to a factor, (num_rows, vocab), at most 1."""
    temperatures = [max(row.params.temperature, MIN_TEMPERATURE) for row in rows]
    return ((logits - largest[:, None]) / logits.new_tensor(temperatures)[:, None]).exp()


def _draw(weights: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Inverse of the cumulative distribution at each row's uniform number, (num_rows,)."""
    # float64: over 10^5 entries, float32 sums lose what unlikely tokens add.
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:].contiguous()
    thresholds = torch.from_numpy(uniforms(rows)).to(weights.device)[:, None] * total
    picked = torch.searchsorted(cumulative, thresholds, right=True)
    # Rounding can put a threshold at the total itself: then the last token with any weight counts.
    last = torch.searchsorted(cumulative, total)
    return torch.minimum(picked, last).clamp(max=weights.shape[-1] - 1).squeeze(-1)


def _draw_filtered(weights: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """As `_draw`, of the `top_k` likeliest tokens, and of these the fewest that have `top_p` of the mass."""
    vocab = weights.shape[-1]
    weights, tokens = weights.sort(dim=-1, descending=True, stable=True)
    top_k = torch.tensor([row.params.top_k or vocab for row in rows], device=weights.device)[:, None]
    weights = weights.masked_fill(torch.arange(vocab, device=weights.device) >= top_k, 0)
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    top_p = cumulative.new_tensor([row.params.top_p for row in rows])[:, None]
    beyond = cumulative - weights >= top_p * cumulative[:, -1:]
    beyond[:, 0] = False
    return tokens.gather(-1, _draw(weights.masked_fill(beyond, 0), rows)[:, None]).squeeze(-1)
