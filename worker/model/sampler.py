"""Samples tokens from logits, greedily or with random numbers that depend only on the request."""

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
from worker.model.grammar import Masks
from worker.model.logits import adjust

MIN_TEMPERATURE = 1e-6
"""Minimum number by which logits are divided: with a smaller number, float32 would overflow. Even at much
higher temperatures, sampling is practically greedy."""

_NUM_CANDIDATES = 256
"""Number of most likely tokens that top-k and top-p look at first; if these are not enough, the whole
vocabulary is sorted."""
_BLOCK_SIZE = 256
_UNUSABLE, UNDECIDED = -1, -2
"""Values in place of a token id if the logits are not finite, or if the candidates were not enough."""
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint32)
_NUM_ROUNDS = 10


class SamplingRow(NamedTuple):
    """Inputs for sampling from one row of logits: parameters, and the key of the random number."""

    params: SamplingParams
    choice: int
    """Index of the sequence within its request."""
    position: int
    """Number of output tokens before the token to sample."""
    adjustments: LogitAdjustments | None = None
    """Logit adjustments, or None if there are none."""


def sample(logits: Tensor, rows: Sequence[SamplingRow], masks: Masks | None = None) -> list[Sampled]:
    """Returns a token per row of `logits` (num_rows, vocab), or an error if the row's maximum is not finite.

    A row's token depends only on its own logits and `SamplingRow`, never on the other rows.
    """
    if not rows:
        return []
    logits = adjust(logits, [row.adjustments for row in rows], masks)
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
    """Converts a sampled id to the engine's type, or to an error if the row has no usable logits."""
    if token_id == _UNUSABLE:
        return GenerationFailed("the model's logits are not finite")
    return SampledToken(token_id)


def uniforms(rows: Sequence[SamplingRow]) -> npt.NDArray[np.float64]:
    """Returns a number in [0, 1) with 53 random bits per row: Philox(seed, (position, choice, 0, 0))."""
    counters = np.array([(row.position, row.choice, 0, 0) for row in rows], dtype=np.uint32)
    seeds = np.array([row.params.seed for row in rows], dtype=np.uint64)
    keys = np.stack([seeds & np.uint64(0xFFFFFFFF), seeds >> np.uint64(32)], axis=-1).astype(np.uint32)
    words = philox(counters, keys)
    high, low = words[:, 0] >> np.uint32(5), words[:, 1] >> np.uint32(6)  # 27 and 26 bits
    return np.asarray((high * 2.0**26 + low) / 2.0**53, dtype=np.float64)


def philox(counters: npt.NDArray[np.uint32], keys: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Computes Philox-4x32-10: random words (n, 4) from counters (n, 4) and keys (n, 2).

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
    """Returns the high and the low 32 bits of the 64-bit products."""
    product = words.astype(np.uint64) * multiplier
    return (product >> np.uint64(32)).astype(np.uint32), product.astype(np.uint32)


def _filters(row: SamplingRow, logits: Tensor) -> bool:
    return row.params.top_p < 1 or 0 < row.params.top_k < logits.shape[-1]


def _scale(logits: Tensor, largest: Tensor, rows: Sequence[SamplingRow], group: Sequence[int]) -> Tensor:
    """Returns (logits - largest) / temperature of the rows in `group`: log-probabilities up to a constant."""
    if len(group) < len(rows):
        index = torch.tensor(group, device=logits.device)
        logits, largest = logits[index], largest[index]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    scaled = logits.to(dtype, copy=True).sub_(largest.to(dtype)[:, None])
    temperatures = scaled.new_tensor([max(rows[n].params.temperature, MIN_TEMPERATURE) for n in group])
    scaled.div_(temperatures[:, None])
    if any(rows[n].params.min_p for n in group):
        # The likeliest token has the number 0, so a token's number is the logarithm of its relative weight.
        lowest = scaled.new_tensor([rows[n].params.min_p for n in group]).log()
        scaled.masked_fill_(scaled < lowest[:, None], -torch.inf)
    return scaled


def _draw_any(scaled: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Samples a token of the whole vocabulary per row, (num_rows,): first a block, then a token in the block.

    Sums of all blocks and a running sum in one block take less time than a running sum over all tokens.
    """
    num_rows, vocab = scaled.shape
    blocks = _blocks(scaled.exp_())
    ends = blocks.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)  # (num_rows, num_blocks)
    thresholds = _uniforms(rows, ends) * ends[:, -1:]
    block = _first_beyond(ends, thresholds)  # (num_rows, 1)
    starts = functional.pad(ends, (1, 0)).gather(-1, block)
    inside = blocks[torch.arange(num_rows, device=blocks.device), block.squeeze(-1)]
    index = _first_beyond(inside.cumsum(dim=-1, dtype=torch.float64), thresholds - starts)
    return (block * _BLOCK_SIZE + index).squeeze(-1).clamp(max=vocab - 1)


def _draw_likely(scaled: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Samples a token per row, (num_rows,), after top-k and then top-p.

    Only the `_NUM_CANDIDATES` most likely tokens are considered. If these may be too few for a row, the
    result of the row is `UNDECIDED`.
    """
    vocab = scaled.shape[-1]
    likeliest, tokens = largest(scaled, min(_NUM_CANDIDATES, vocab))
    weights = likeliest.exp()
    top_k = torch.tensor([row.params.top_k or vocab for row in rows], device=scaled.device)[:, None]
    weights = weights.masked_fill(torch.arange(weights.shape[-1], device=scaled.device) >= top_k, 0)
    mass = _mass(weights)
    if any(row.params.top_k in (0, vocab) for row in rows):
        mass = torch.where(top_k < vocab, mass, _mass(scaled.exp_()))
    kept = _keep(weights, mass, rows)
    num_kept = kept.ne(0).sum(dim=-1, keepdim=True)
    # Outside the candidates there may be a token as likely as the last candidate; with a lower id, it ranks
    # before that candidate. A row is therefore undecided if its last kept token ties with the last candidate.
    is_decided = likeliest.gather(-1, (num_kept - 1).clamp(min=0)) > likeliest[:, -1:]
    if vocab > _NUM_CANDIDATES:
        is_decided &= (top_k <= _NUM_CANDIDATES) | (top_k == vocab)
        tokens = tokens.masked_fill(~is_decided, UNDECIDED)
    return tokens.gather(-1, _draw(kept, rows)).squeeze(-1)


def _draw_sorted(scaled: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Samples like `_draw_likely`, but sorts the whole vocabulary; this is slow, but decides every row."""
    vocab = scaled.shape[-1]
    weights, tokens = scaled.exp_().sort(dim=-1, descending=True, stable=True)
    top_k = torch.tensor([row.params.top_k or vocab for row in rows], device=weights.device)[:, None]
    weights = weights.masked_fill(torch.arange(vocab, device=weights.device) >= top_k, 0)
    kept = _keep(weights, _mass(weights), rows)
    return tokens.gather(-1, _draw(kept, rows)).squeeze(-1)


def largest(scaled: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns the largest entries in descending order, and their indices: (num_rows, count) each.

    Equal entries are in the order of their indices.
    """
    values, indices = scaled.topk(count, dim=-1)
    indices, order = indices.sort(dim=-1)
    values, order = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return values, indices.gather(-1, order)


def _blocks(weights: Tensor) -> Tensor:
    """Cuts rows into blocks, (num_rows, num_blocks, _BLOCK_SIZE); the last block is padded with zeros."""
    # If no entry is missing, padding would only copy the tensor.
    missing = -weights.shape[-1] % _BLOCK_SIZE
    padded = functional.pad(weights, (0, missing)) if missing else weights
    return padded.reshape(len(weights), -1, _BLOCK_SIZE)


def _mass(weights: Tensor) -> Tensor:
    """Returns the sum of each row, (num_rows, 1)."""
    # Rows are summed by blocks: torch sums a long row in another order if it is the only row, and then a
    # row's sum, and with it the sampled token, would depend on the number of rows.
    return _blocks(weights).sum(dim=-1).sum(dim=-1, keepdim=True, dtype=torch.float64)


def _keep(weights: Tensor, mass: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Keeps the largest weights that together have `top_p` of the mass; sets all other weights to 0."""
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    top_p = cumulative.new_tensor([row.params.top_p for row in rows])[:, None]
    beyond = cumulative - weights >= top_p * mass
    beyond[:, 0] = False
    return weights.masked_fill(beyond, 0)


def _draw(weights: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Samples an index per row, (num_rows, 1), by the inverse of the cumulative distribution."""
    # In float32, a running sum over many entries would lose the small weights of unlikely tokens.
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    return _first_beyond(cumulative, _uniforms(rows, cumulative) * cumulative[:, -1:])


def _first_beyond(cumulative: Tensor, thresholds: Tensor) -> Tensor:
    """Returns the first index (num_rows, 1) at which a running sum exceeds the threshold (num_rows, 1)."""
    picked = torch.searchsorted(cumulative, thresholds, right=True)
    # Rounding can make a threshold equal to the total sum; then the last index with a weight is right.
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    return torch.minimum(picked, last).clamp(max=cumulative.shape[-1] - 1)


def _uniforms(rows: Sequence[SamplingRow], like: Tensor) -> Tensor:
    """Returns the rows' random numbers on the device of `like`, (num_rows, 1)."""
    return torch.from_numpy(uniforms(rows)).to(like.device)[:, None]
