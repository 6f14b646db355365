"""Attention over a paged KV cache, called by transformers' models through `AttentionInterface`.

The tokens of all sequences of a step stand side by side in one row of T tokens. Each call writes their keys
and values into the cache and attends, per sequence, to what the cache holds of it.
"""

import threading
from collections import Counter
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, scaled_dot_product_attention

from worker.model.kernels import native
from worker.model.kernels.native import OperatorState
from worker.model.kv_cache import PagedKVCache

NAME = "lorelay"
"""The attention's name; one that transformers' mask interface doesn't know gets no mask."""

_STATE = "lorelay_attention"
_HARMLESS = frozenset({"position_ids", "cache_position", "use_cache", "output_router_logits"})


@dataclass(eq=False)
class QueryGroup:
    """Sequences of a step with the same number of query tokens: all decodes, or one chunk of a prefill."""

    rows: Tensor | slice
    """(n x q,): their places among the step's T tokens, sequence after sequence; a slice where it can be."""
    positions: Tensor
    """(n, q): the place of each query token in its sequence."""
    block_tables: Tensor
    """(n, num_blocks): blocks that hold a sequence's tokens; shorter tables end in any valid block."""
    _masks: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    @cached_property
    def row_numbers(self) -> Tensor:
        """The same as `rows`, always a tensor."""
        if isinstance(self.rows, Tensor):
            return self.rows
        return torch.arange(self.rows.start, self.rows.stop, device=self.positions.device)

    def mask(self, num_keys: int, num_groups: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """(n, 1, num_groups x q, num_keys): 0 where a query sees a key, else -inf. Same for all layers alike.

        A query at position p sees keys at 0..p, with a window w at p-w+1..p.
        """
        cache_key = (num_keys, num_groups, window, dtype)
        if cache_key not in self._masks:
            query = self.positions[:, None, :, None]  # (n, 1, q, 1)
            key = torch.arange(num_keys, device=query.device)
            visible = key <= query
            if window is not None:
                visible &= key > query - window
            mask = torch.zeros(visible.shape, dtype=dtype, device=query.device)
            mask.masked_fill_(~visible, -torch.inf)
            self._masks[cache_key] = mask.repeat(1, 1, num_groups, 1)
        return self._masks[cache_key]


@dataclass(frozen=True, eq=False)
class StepLayout:
    """Where the tokens of one step stand: in the cache (`slots`, (T,)), and in which sequences."""

    slots: Tensor
    chunks: tuple[QueryGroup, ...]
    """Of prefills, one sequence each."""
    decodes: QueryGroup | None
    """The sequences with one token each."""

    def as_tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
        """As the operators take it."""
        none = self.slots.new_empty(0, 0)
        decodes = self.decodes
        rows = (
            (none, none, none)
            if decodes is None
            else (decodes.row_numbers, decodes.block_tables, decodes.positions)
        )
        places = [
            (int(group.row_numbers[0]), group.positions.numel(), int(group.positions[0, 0]))
            for group in self.chunks
        ]
        chunks = torch.tensor(places, dtype=torch.long).view(-1, 3)
        return self.slots, *rows, chunks, [group.block_tables[0] for group in self.chunks]


@dataclass(eq=False)
class AttentionState:
    """What the attention function needs beside its arguments: shared by all layers of one model."""

    kv_cache: PagedKVCache
    operators: OperatorState | None = None
    """Of `worker.model.kernels.native`, where they can be called for the tensors of this model."""
    layout: StepLayout | None = None
    """Of the step that has begun."""
    calls: Counter[int] = field(default_factory=Counter)
    """Calls per layer, and ..."""
    windows: dict[int, int | None] = field(default_factory=dict)
    """... the sliding window it named last; read by the self-check."""

    def use(self, operators: OperatorState) -> None:
        """From now on the operators attend."""
        self.operators = operators
        self.kv_cache.share_with(operators)
        _let_operators_call_back()

    def begin_step(self, layout: StepLayout) -> None:
        """Says where the tokens of the next forward pass, in this thread, stand."""
        self.layout = layout
        if self.operators is not None:
            _step.state = self
            self.operators.begin_step(*layout.as_tensors())


class _Options(NamedTuple):
    """What a model asks of its attention."""

    scaling: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None

    @property
    def are_plain(self) -> bool:
        return self.softcap is None and self.sinks is None


_step = threading.local()
"""The state of the step that a thread is in, for the operators' calls back."""


@cache
def register() -> None:
    """Makes the attention known to transformers as `NAME`."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, paged_attention)


def attach(model: nn.Module, state: AttentionState) -> None:
    """Gives `state` to every attention module of `model`."""
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            setattr(module, _STATE, state)


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention of query (1, num_heads, T, head_dim) to the cache, with the new key and value in it.

    `key` and `value` are (1, num_kv_heads, T, head_dim); the output is (1, T, num_heads, head_dim).

    Raises:
        NotImplementedError: the model asks for something that would change the result and is not known here.
    """
    scaling = options.pop("scaling", None)
    window = options.pop("sliding_window", None)
    softcap = options.pop("softcap", None)
    sinks = options.pop("s_aux", None)
    _refuse_unknown(module, attention_mask, options)
    state: AttentionState = getattr(module, _STATE)
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    state.calls[layer] += 1
    state.windows[layer] = window
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    if state.operators is not None:
        output = native.attention(
            query, key, value, sinks, layer, scaling=scaling, window=window, softcap=softcap
        )
        return output, None
    return _attend(state, layer, query, key, value, _Options(scaling, window, softcap, sinks)), None


def _attend(
    state: AttentionState, layer: int, query: Tensor, key: Tensor, value: Tensor, options: _Options
) -> Tensor:
    """The attention of one layer, group by group."""
    layout = state.layout
    assert layout is not None, "a forward pass without a layout"
    keys, values = state.kv_cache.write(layer, layout.slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
    output = query.new_empty(query.shape[2], query.shape[1], value.shape[-1])  # (T, num_heads, head_dim)
    for group in (*layout.chunks, *([layout.decodes] if layout.decodes else [])):
        output[group.rows] = _attend_group(query[0], keys, values, group, options)
    return output[None]


@cache
def _let_operators_call_back() -> None:
    """Lets `native.attention` call `_attend` for what its C++ doesn't do.

    That is capped scores, sinks, and a layer's very first call, which shows the shape of its cache.
    """
    torch.library.impl("lorelay::attend_in_groups", "CPU", _attend_in_groups)


def _attend_in_groups(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    layer: int,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    return _attend(_step.state, layer, query, key, value, _Options(scaling, window, softcap, sinks))


def _refuse_unknown(module: nn.Module, attention_mask: Tensor | None, options: dict[str, Any]) -> None:
    name = type(module).__name__
    if attention_mask is not None:
        raise NotImplementedError(f"{name} brings its own attention mask")
    if options.pop("is_causal", None) is False or getattr(module, "is_causal", True) is False:
        raise NotImplementedError(f"{name} is not causal")
    if options.pop("dropout", 0.0):
        raise NotImplementedError(f"{name} uses dropout")
    for option, given in options.items():
        if given is not None and given is not False and option not in _HARMLESS:
            raise NotImplementedError(f"{name} passes {option!r} to its attention")


def _attend_group(
    query: Tensor, keys: Tensor, values: Tensor, group: QueryGroup, options: _Options
) -> Tensor:
    """The output (n x q, num_heads, head_dim) of one group; `query` is (num_heads, T, head_dim)."""
    scaling, window, softcap, sinks = options
    num_sequences, num_queries = group.positions.shape
    num_heads, num_kv_heads = query.shape[0], keys.shape[2]
    num_groups = num_heads // num_kv_heads
    # Query heads that share a KV head stand as further queries of that head: no copy of keys and values.
    query = query[:, group.rows].reshape(num_kv_heads, num_groups, num_sequences, num_queries, -1)
    query = query.permute(2, 0, 1, 3, 4).flatten(2, 3)  # (n, num_kv_heads, num_groups x q, head_dim)
    key = _gather(keys, group.block_tables)  # (n, num_kv_heads, num_keys, head_dim)
    value = _gather(values, group.block_tables)
    mask = group.mask(key.shape[2], num_groups, window, query.dtype)
    if options.are_plain:
        output = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    else:
        if sinks is not None:
            sinks = (
                sinks.view(num_kv_heads, num_groups, 1)
                .expand(-1, -1, num_queries)
                .reshape(1, num_kv_heads, -1, 1)
            )
        output = _attend_slowly(query, key, value, mask, scaling, softcap, sinks)
    output = output.reshape(num_sequences, num_kv_heads, num_groups, num_queries, -1)
    return output.permute(0, 3, 1, 2, 4).reshape(num_sequences * num_queries, num_heads, -1)


def _gather(layer: Tensor, block_tables: Tensor) -> Tensor:
    """The entries (n, num_kv_heads, num_blocks x block_size, head_dim) of the blocks of n sequences."""
    # On the CPU this copies whole blocks: a fifth of the time of `layer[block_tables]`.
    blocks = embedding(block_tables, layer.flatten(1))
    return blocks.view(len(block_tables), -1, *layer.shape[2:]).transpose(1, 2)


def _attend_slowly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with what PyTorch's kernel lacks: scores capped to ±`softcap`, and sinks.

    A sink is one more score per head, (1, num_kv_heads, num_groups x q, 1), that takes weight and gives none.
    """
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    scores = scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).expand(len(scores), -1, -1, -1)], dim=-1)
    dtype = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(dim=-1, dtype=dtype)[..., : key.shape[2]]
    return weights.to(value.dtype) @ value
