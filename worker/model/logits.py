"""Adjusts logits before sampling; no other code changes logits.

Repetition penalties come first, then biases and the other penalties, then lists of allowed tokens. All tokens
that a sequence's grammar does not allow are banned last, so that no bias can allow a token that breaks the
grammar.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from worker.engine.sequence import LogitAdjustments
from worker.model.grammar import Masks

_BITS = [1 << bit for bit in range(8)]


class Changes(NamedTuple):
    """Numbers to add to the logits of one row."""

    token_ids: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]
    """The number for each entry of `token_ids`; minus infinity bans a token."""


def adjust(
    logits: Tensor, adjustments: Sequence[LogitAdjustments | None], masks: Masks | None = None
) -> Tensor:
    """Returns `logits` (num_rows, vocab) with each row adjusted; `logits` itself if nothing changes."""
    changed = _allow(_add(_repel(logits, adjustments), adjustments), adjustments)
    return changed if masks is None or not masks.rows else _apply(changed, masks)


def _apply(logits: Tensor, masks: Masks) -> Tensor:
    """Returns a copy in which tokens that a row's grammar does not allow have minus infinity as logits."""
    rows = torch.tensor(masks.rows, device=logits.device)
    packed = torch.from_numpy(masks.allowed.view(np.uint8)).to(logits.device)
    # On the device, bits become bytes: only an eighth of the memory has to be copied there.
    bits = packed[:, :, None].bitwise_and(torch.tensor(_BITS, dtype=torch.uint8, device=logits.device))
    allowed = bits.ne(0).flatten(1)[:, : logits.shape[1]]
    # Tokens beyond the tokenizer's vocabulary stand for no text; models pad their vocabulary with them.
    allowed = functional.pad(allowed, (0, logits.shape[1] - allowed.shape[1]))
    return logits.index_put((rows,), logits[rows].masked_fill(~allowed, -torch.inf))


def _repel(logits: Tensor, adjustments: Sequence[LogitAdjustments | None]) -> Tensor:
    """Returns the logits with repetition penalties; `logits` itself if there are none."""
    found = [
        (row, one.repetition_penalty, np.array(one.seen.token_ids, np.int64))
        for row, one in enumerate(adjustments)
        if one is not None and one.seen is not None
    ]
    if not found:
        return logits
    sizes = [len(token_ids) for _, _, token_ids in found]
    rows = np.repeat([row for row, _, _ in found], sizes)
    token_ids = np.concatenate([token_ids for _, _, token_ids in found])
    index = tuple(torch.from_numpy(np.stack((rows, token_ids))).to(logits.device))
    penalties = torch.from_numpy(np.repeat([penalty for _, penalty, _ in found], sizes)).to(logits)
    values = logits[index]
    return logits.index_put(index, torch.where(values > 0, values / penalties, values * penalties))


def _allow(logits: Tensor, adjustments: Sequence[LogitAdjustments | None]) -> Tensor:
    """Returns the logits with minus infinity for tokens that are not allowed; `logits` if all are."""
    limited = {row: one.allowed for row, one in enumerate(adjustments) if one is not None and one.allowed}
    if not limited:
        return logits
    changed = logits.clone()
    for row, allowed in limited.items():
        index = torch.tensor(list(allowed), device=logits.device)
        changed[row] = torch.full_like(logits[row], -torch.inf).index_copy(0, index, logits[row, index])
    return changed


def _add(logits: Tensor, adjustments: Sequence[LogitAdjustments | None]) -> Tensor:
    """Returns the logits with biases, penalties and bans added; `logits` itself if there are none."""
    changes = [
        (row, _changes(adjustment)) for row, adjustment in enumerate(adjustments) if adjustment is not None
    ]
    if not any(len(change.token_ids) for _, change in changes):
        return logits
    rows = np.repeat([row for row, _ in changes], [len(change.token_ids) for _, change in changes])
    token_ids = np.concatenate([change.token_ids for _, change in changes])
    values = np.concatenate([change.values for _, change in changes])
    index = torch.from_numpy(np.stack((rows, token_ids))).to(logits.device)
    return logits.index_put(tuple(index), torch.from_numpy(values).to(logits), accumulate=True)


def _changes(adjustment: LogitAdjustments) -> Changes:
    """Returns the changes of one row, with each token at most once."""
    # The counts are copied as whole arrays: a loop over a long output would delay every token of the batch.
    token_ids, values = np.empty(0, np.int64), np.empty(0, np.float64)
    counts = adjustment.output_counts
    if counts is not None:
        token_ids = np.array(counts.token_ids, np.int64)
        values = -(adjustment.presence_penalty + adjustment.frequency_penalty * np.array(counts.counts))
    others: dict[int, float] = {}
    for token_id, value in (*adjustment.bias.items(), *((banned, -np.inf) for banned in adjustment.banned)):
        index = counts.find(token_id) if counts is not None else None
        if index is None:
            others[token_id] = others.get(token_id, 0.0) + value
        else:
            values[index] += value
    return Changes(
        np.concatenate((token_ids, np.array([*others], np.int64))),
        np.concatenate((values, np.array([*others.values()], np.float64))),
    )
