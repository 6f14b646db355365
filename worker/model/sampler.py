"""From logits to tokens: greedy, or drawn with random numbers that depend on the request alone."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from shared.errors import GenerationFailed
from shared.messages import SamplingParams
from worker.engine.sequence import LogitAdjustments, Sampled, SampledToken
from worker.model.logits import adjust

MIN_TEMPERATURE = 1e-6
"""Smallest divisor of logits: float32 would overflow with smaller ones, and sampling is greedy long
before."""

_NUM_CANDIDATES = 256
"""Likeliest tokens that top-k and top-p look at first; if they don't suffice, the whole vocabulary is
sorted."""
_BLOCK_SIZE = 256
_UNUSABLE, UNDECIDED = -1, -2
"""Values in place of a token id: the logits are not finite; the candidates did not suffice."""
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint32)
_NUM_ROUNDS = 10


class SamplingRow(NamedTuple):
    """A row of logits: the sampling parameters of its sequence, and the key of its random number."""

    params: SamplingParams
    choice: int
    """Index of the sequence within its request."""
    position: int
    """Number of output tokens before this one."""
    adjustments: LogitAdjustments | None = None
    """Changes of the logits; None leaves them as they are."""


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[Sampled]:
    """A token per row of `logits` (num_rows, vocab); an error if a row has NaN or no finite largest entry.

    A row's token depends on its own logits and `SamplingRow` only, never on the other rows.
    """
    if not rows:
        return []
    logits = adjust(logits, [row.adjustments for row in rows])
    largest, tokens = logits.max(dim=-1)  # (num_rows,), NaN if the row has one
    drawn = [n for n, row in enumerate(rows) if row.params.temperature > 0]
    plain = [n for n in drawn if not _filters(rows[n], logits)]
    filtered = [n for n in drawn if _filters(rows[n], logits)]
    for group, draw in ((plain, _draw_any), (filtered, _draw_likely)):
        if group:
            tokens[group] = draw(_scale(logits, largest, rows, group), [rows[n] for n in group])
    picked: list[int] = tokens.masked_fill(~largest.isfinite(), _UNUSABLE).tolist()
    if hard := [n for n, token in enumerate(picked) if token == UNDECIDED]:
        sorted_out = _draw_sorted(_scale(logits, largest, rows, hard), [rows[n] for n in hard])
        for n, token in zip(hard, sorted_out.tolist(), strict=True):
            picked[n] = token
    return [_sampled(token_id) for token_id in picked]


def _sampled(token_id: int) -> Sampled:
    """The engine's record of a picked token, or the error of a row that has no usable logits."""
    if token_id == _UNUSABLE:
        return GenerationFailed("the model's logits are not finite")
    return SampledToken(token_id)


def uniforms(rows: Sequence[SamplingRow]) -> npt.NDArray[np.float64]:
    """Random numbers in [0, 1), one per row: Philox(key=seed, counter=(position, choice, 0, 0)), 53 bits."""
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


def _filters(row: SamplingRow, logits: Tensor) -> bool:
    return row.params.top_p < 1 or 0 < row.params.top_k < logits.shape[-1]


def _scale(logits: Tensor, largest: Tensor, rows: Sequence[SamplingRow], group: Sequence[int]) -> Tensor:
    """(logits - largest) / temperature of the rows in `group`: log-probabilities up to a term, at most 0."""
    if len(group) < len(rows):
        index = torch.tensor(group, device=logits.device)
        logits, largest = logits[index], largest[index]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    scaled = logits.to(dtype, copy=True).sub_(largest.to(dtype)[:, None])
    temperatures = scaled.new_tensor([max(rows[n].params.temperature, MIN_TEMPERATURE) for n in group])
    return scaled.div_(temperatures[:, None])


def _draw_any(scaled: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """A token of the whole vocabulary per row, (num_rows,): first the block it lies in, then its place there.

    Summing blocks, and then one block, is less work than a running sum over the vocabulary.
    """
    num_rows, vocab = scaled.shape
    blocks = _blocks(scaled.exp_())
    ends = blocks.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)  # (num_rows, num_blocks)
    thresholds = _uniforms(rows, ends) * ends[:, -1:]
    block = _first_beyond(ends, thresholds)  # (num_rows, 1)
    starts = functional.pad(ends, (1, 0)).gather(-1, block)
    inside = blocks[torch.arange(num_rows, device=blocks.device), block.squeeze(-1)]
    place = _first_beyond(inside.cumsum(dim=-1, dtype=torch.float64), thresholds - starts)
    return (block * _BLOCK_SIZE + place).squeeze(-1).clamp(max=vocab - 1)


def _draw_likely(scaled: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """A token per row, (num_rows,), of the `top_k` likeliest, of these the fewest with `top_p` of the mass.

    Only the likeliest `_NUM_CANDIDATES` are looked at; a row for which they may not suffice is `UNDECIDED`.
    """
    vocab = scaled.shape[-1]
    likeliest, tokens = _largest(scaled, min(_NUM_CANDIDATES, vocab))
    weights = likeliest.exp()
    top_k = torch.tensor([row.params.top_k or vocab for row in rows], device=scaled.device)[:, None]
    weights = weights.masked_fill(torch.arange(weights.shape[-1], device=scaled.device) >= top_k, 0)
    mass = _mass(weights)
    if any(row.params.top_k in (0, vocab) for row in rows):
        mass = torch.where(top_k < vocab, mass, _mass(scaled.exp_()))
    kept = _keep(weights, mass, rows)
    num_kept = kept.ne(0).sum(dim=-1, keepdim=True)
    # Tokens as likely as the last candidate may lie beyond the candidates, and come first by their lower ids.
    is_decided = likeliest.gather(-1, (num_kept - 1).clamp(min=0)) > likeliest[:, -1:]
    if vocab > _NUM_CANDIDATES:
        is_decided &= (top_k <= _NUM_CANDIDATES) | (top_k == vocab)
        tokens = tokens.masked_fill(~is_decided, UNDECIDED)
    return tokens.gather(-1, _draw(kept, rows)).squeeze(-1)


def _draw_sorted(scaled: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """The result of `_draw_likely` from a sort of the whole vocabulary: always decided, and slow."""
    vocab = scaled.shape[-1]
    weights, tokens = scaled.exp_().sort(dim=-1, descending=True, stable=True)
    top_k = torch.tensor([row.params.top_k or vocab for row in rows], device=weights.device)[:, None]
    weights = weights.masked_fill(torch.arange(vocab, device=weights.device) >= top_k, 0)
    kept = _keep(weights, _mass(weights), rows)
    return tokens.gather(-1, _draw(kept, rows)).squeeze(-1)


def _largest(scaled: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest entries and their places, (num_rows, count) each; of equal ones the first comes first."""
    values, places = scaled.topk(count, dim=-1)
    places, order = places.sort(dim=-1)
    values, order = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return values, places.gather(-1, order)


def _blocks(weights: Tensor) -> Tensor:
    """Rows cut into blocks, (num_rows, num_blocks, _BLOCK_SIZE), the last one filled up with zeros."""
    # If nothing is missing, padding would copy for nothing.
    missing = -weights.shape[-1] % _BLOCK_SIZE
    padded = functional.pad(weights, (0, missing)) if missing else weights
    return padded.reshape(len(weights), -1, _BLOCK_SIZE)


def _mass(weights: Tensor) -> Tensor:
    """The sum of each row, (num_rows, 1)."""
    # Summed by blocks: torch adds up a long row in another order if it is the only one, and a row's token
    # must not depend on the other rows.
    return _blocks(weights).sum(dim=-1).sum(dim=-1, keepdim=True, dtype=torch.float64)


def _keep(weights: Tensor, mass: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Descending weights, 0 for those behind the first ones that have `top_p` of the mass."""
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    top_p = cumulative.new_tensor([row.params.top_p for row in rows])[:, None]
    beyond = cumulative - weights >= top_p * mass
    beyond[:, 0] = False
    return weights.masked_fill(beyond, 0)


def _draw(weights: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Inverse of the cumulative distribution at each row's uniform number: places, (num_rows, 1)."""
    # In float32, a sum over many entries would lose the small weights of unlikely tokens.
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    return _first_beyond(cumulative, _uniforms(rows, cumulative) * cumulative[:, -1:])


def _first_beyond(cumulative: Tensor, thresholds: Tensor) -> Tensor:
    """The first place (num_rows, 1) where a running sum exceeds the row's threshold (num_rows, 1)."""
    picked = torch.searchsorted(cumulative, thresholds, right=True)
    # Rounding can make a threshold equal to the total; then the last place with any weight is meant.
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    return torch.minimum(picked, last).clamp(max=cumulative.shape[-1] - 1)


def _uniforms(rows: Sequence[SamplingRow], like: Tensor) -> Tensor:
    """The rows' random numbers on the device of `like`, (num_rows, 1)."""
    return torch.from_numpy(uniforms(rows)).to(like.device)[:, None]
