"""Builds the input tensors of a scheduled batch, runs the forward pass, and returns the logits."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from worker.engine.sequence import Batch, ScheduledSequence
from worker.model.attention import AttentionMetadata, AttentionState, QueryGroup
from worker.model.forward import Graph
from worker.model.lora import BASE, LoraStack


class BatchForward:
    """A model's forward pass over scheduled batches."""

    def __init__(
        self,
        forward: Graph,
        state: AttentionState,
        lora: LoraStack,
        device: torch.device,
        slot_of: Callable[[str], int],
    ) -> None:
        """`forward`: the model's forward pass.

        `slot_of`: returns an adapter's slot, or raises `AdapterError`.
        """
        self._forward = forward
        self._state = state
        self._lora = lora
        self._device = device
        self._slot_of = slot_of

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> Tensor:
        """Returns logits (n, vocab), for the last token of each of the n sequences that sample."""
        token_ids: list[int] = []
        positions: list[int] = []
        spans: list[tuple[int, int]] = []
        sampled_rows: list[int] = []
        for seq, num_tokens in ((item.seq, item.num_tokens) for item in batch):
            start, end = seq.num_computed_tokens, seq.num_computed_tokens + num_tokens
            token_ids += seq.token_ids[start:end]
            positions += range(start, end)
            slot = BASE if seq.adapter_name is None else self._slot_of(seq.adapter_name)
            spans.append((slot, num_tokens))
            if end == len(seq.token_ids):
                sampled_rows.append(len(token_ids) - 1)
        self._lora.set_rows(spans, sampled_rows)
        self._state.begin_step(attention_metadata(batch, self._state.kv_cache.block_size, self._device))
        return self._forward(
            torch.tensor([token_ids], device=self._device),
            torch.tensor([positions], device=self._device),
            torch.tensor(sampled_rows, dtype=torch.long, device=self._device),
        )


def attention_metadata(batch: Batch, block_size: int, device: torch.device) -> AttentionMetadata:
    """Returns a batch's attention metadata: the cache indices of its tokens, and its groups of sequences."""
    indices: list[int] = []
    decodes: list[tuple[int, ScheduledSequence]] = []
    chunks: list[tuple[int, ScheduledSequence]] = []
    for item in batch:
        seq, first_row = item.seq, len(indices)
        (decodes if item.num_tokens == 1 else chunks).append((first_row, item))
        for position in range(seq.num_computed_tokens, seq.num_computed_tokens + item.num_tokens):
            indices.append(seq.block_table[position // block_size] * block_size + position % block_size)
    return AttentionMetadata(
        torch.tensor(indices, device=device),
        tuple(_group([chunk], block_size, device) for chunk in chunks),
        _group(decodes, block_size, device) if decodes else None,
    )


def _group(
    members: Iterable[tuple[int, ScheduledSequence]], block_size: int, device: torch.device
) -> QueryGroup:
    """Returns the query group of items with equal `num_tokens`; `members` are (first row, item) pairs."""
    rows: list[int] = []
    positions: list[range] = []
    tables: list[list[int]] = []
    for first_row, item in members:
        start, end = item.seq.num_computed_tokens, item.seq.num_computed_tokens + item.num_tokens
        rows += range(first_row, first_row + item.num_tokens)
        positions.append(range(start, end))
        tables.append(item.seq.block_table[: -(-end // block_size)])
    longest = max(map(len, tables))
    padded = [table + table[:1] * (longest - len(table)) for table in tables]
    # The scheduler puts decodes first, and a chunk's tokens are neighbours: rows are mostly contiguous. A
    # slice gives views of such rows, an index tensor would give copies.
    is_contiguous = rows == list(range(rows[0], rows[0] + len(rows)))
    return QueryGroup(
        slice(rows[0], rows[0] + len(rows)) if is_contiguous else torch.tensor(rows, device=device),
        torch.tensor([list(entry) for entry in positions], device=device),
        torch.tensor(padded, device=device),
    )
