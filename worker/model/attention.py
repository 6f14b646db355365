"""Attention over a paged KV cache, called by transformers' models through `AttentionInterface`.

The tokens of all sequences of a step are concatenated to T tokens with batch size 1. Each call writes the
keys and values of these tokens into the cache; each token then attends to the cache entries of its own
sequence.
"""

import threading
from collections import Counter
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, scaled_dot_product_attention

from worker.model.kernels import native
from worker.model.kernels.native import AttentionOptions, KernelState
from worker.model.kv_cache import PagedKVCache

NAME = "lorelay"
"""The attention's name in transformers, which builds no mask because no mask function has this name."""

_STATE = "lorelay_attention"
_HARMLESS = frozenset({"position_ids", "cache_position", "use_cache", "output_router_logits"})


@dataclass(eq=False)
class QueryGroup:
    """Sequences of a step with the same number of query tokens: all decodes, or one chunk of a prompt."""

    rows: Tensor | slice
    """(n x q,): indices of the query tokens among the step's T tokens, sequence by sequence; a slice if they
    are contiguous."""
    positions: Tensor
    """(n, q): position of each query token in its sequence."""
    block_tables: Tensor
    """(n, num_blocks): block tables; short tables are padded with any valid block, which the mask hides."""
    _masks: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    @cached_property
    def row_numbers(self) -> Tensor:
        """`rows` as a tensor."""
        if isinstance(self.rows, Tensor):
            return self.rows
        return torch.arange(self.rows.start, self.rows.stop, device=self.positions.device)

    def mask(self, num_keys: int, num_groups: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """Returns the mask (n, 1, num_groups x q, num_keys): 0 where a query sees a key, else -inf.

        All layers share the mask.

        A query at position p sees the keys at 0..p; with a sliding window w, the keys at p-w+1..p.
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
class AttentionMetadata:
    """Attention metadata of one step: the places of its tokens in the cache and in their sequences."""

    cache_indices: Tensor
    """(T,): index of each token in the cache, block x block_size + offset."""
    chunks: tuple[QueryGroup, ...]
    """A group for each chunk of a prompt."""
    decodes: QueryGroup | None
    """The group of all sequences with one token, or None if there is no such sequence."""

    def as_tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
        """Returns the arguments of `KernelState.begin_step`."""
        none = self.cache_indices.new_empty(0, 0)
        decodes = self.decodes
        rows = (
            (none, none, none)
            if decodes is None
            else (decodes.row_numbers, decodes.block_tables, decodes.positions)
        )
        spans = [
            (int(group.row_numbers[0]), group.positions.numel(), int(group.positions[0, 0]))
            for group in self.chunks
        ]
        chunks = torch.tensor(spans, dtype=torch.long).view(-1, 3)
        return self.cache_indices, *rows, chunks, [group.block_tables[0] for group in self.chunks]


@dataclass(eq=False)
class AttentionState:
    """Inputs of the attention function that transformers does not pass; they are the same for all layers."""

    kv_cache: PagedKVCache
    kernels: KernelState | None = None
    """The C++ kernels, or None if PyTorch computes the attention."""
    metadata: AttentionMetadata | None = None
    """Attention metadata of the current step; None before the first step."""
    calls: Counter[int] = field(default_factory=Counter)
    """Number of calls of the attention function, by layer; for the self-check."""
    windows: dict[int, int | None] = field(default_factory=dict)
    """Sliding window of the last call by layer, for the self-check; None if the layer has no window."""

    def use(self, kernels: KernelState) -> None:
        """Makes the C++ kernels compute the attention from now on."""
        self.kernels = kernels
        self.kv_cache.share_with(kernels)
        _register_fallback()

    def begin_step(self, metadata: AttentionMetadata) -> None:
        """Sets the attention metadata of this thread's next forward pass."""
        self.metadata = metadata
        if self.kernels is not None:
            _step.state = self
            self.kernels.begin_step(*metadata.as_tensors())


_step = threading.local()
"""Holds the `AttentionState` of this thread's step in `state`, for `_attend_for_kernel`."""


@cache
def register() -> None:
    """Registers the attention function in transformers as `NAME`."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, paged_attention)


def attach(model: nn.Module, state: AttentionState) -> None:
    """Sets `state` on every attention module of `model`."""
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
    """Stores `key` and `value` in the cache, and returns the causal attention of `query` to the cache.

    `query` is (1, num_heads, T, head_dim), `key` and `value` are (1, num_kv_heads, T, head_dim); the output
    is (1, T, num_heads, head_dim).

    Raises:
        NotImplementedError: the model passes an option that changes the output and is not supported.
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
    known = AttentionOptions(scaling, window, softcap, sinks)
    if state.kernels is not None:
        return native.attention(query, key, value, layer, known), None
    return _attend(state, layer, query, key, value, known), None


def _attend(
    state: AttentionState, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
) -> Tensor:
    """Computes the attention of one layer with PyTorch, group by group."""
    metadata = state.metadata
    assert metadata is not None, "a forward pass before `begin_step`"
    new = key[0].transpose(0, 1), value[0].transpose(0, 1)
    keys, values = state.kv_cache.write(layer, metadata.cache_indices, *new)
    output = query.new_empty(query.shape[2], query.shape[1], value.shape[-1])  # (T, num_heads, head_dim)
    for group in (*metadata.chunks, *([metadata.decodes] if metadata.decodes else [])):
        output[group.rows] = _attend_group(query[0], keys, values, group, options)
    return output[None]


@cache
def _register_fallback() -> None:
    """Registers the function that the attention kernel calls for cases that it can't compute itself.

    These cases are capped scores, sinks, and the first call of a layer, which allocates the layer's cache.
    """
    torch.library.impl("lorelay::attend_in_groups", "CPU", _attend_for_kernel)


def _attend_for_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    layer: int,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Calls `_attend`, with the eight arguments of the C++ operator."""
    options = AttentionOptions(scaling, window, softcap, sinks)
    return _attend(_step.state, layer, query, key, value, options)


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
    query: Tensor, keys: Tensor, values: Tensor, group: QueryGroup, options: AttentionOptions
) -> Tensor:
    """Returns the output (n x q, num_heads, head_dim) of one group; `query` is (num_heads, T, head_dim)."""
    num_sequences, num_queries = group.positions.shape
    num_heads, num_kv_heads = query.shape[0], keys.shape[2]
    num_groups = num_heads // num_kv_heads
    # Query heads that share a KV head become further queries of that head, which saves copies of its entries.
    query = query[:, group.rows].reshape(num_kv_heads, num_groups, num_sequences, num_queries, -1)
    query = query.permute(2, 0, 1, 3, 4).flatten(2, 3)  # (n, num_kv_heads, num_groups x q, head_dim)
    key = _gather(keys, group.block_tables)  # (n, num_kv_heads, num_keys, head_dim)
    value = _gather(values, group.block_tables)
    mask = group.mask(key.shape[2], num_groups, options.window, query.dtype)
    if options.are_plain:
        output = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=options.scaling)
    else:
        output = _attend_slowly(query, key, value, mask, options)
    output = output.reshape(num_sequences, num_kv_heads, num_groups, num_queries, -1)
    return output.permute(0, 3, 1, 2, 4).reshape(num_sequences * num_queries, num_heads, -1)


def _gather(layer: Tensor, block_tables: Tensor) -> Tensor:
    """Returns the entries of n sequences' blocks: (n, num_kv_heads, num_blocks x block_size, head_dim)."""
    # On a CPU, `embedding` copies whole blocks and takes a fifth of the time of `layer[block_tables]`.
    blocks = embedding(block_tables, layer.flatten(1))
    return blocks.view(len(block_tables), -1, *layer.shape[2:]).transpose(1, 2)


def _attend_slowly(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, options: AttentionOptions
) -> Tensor:
    """Computes attention with two options that PyTorch's kernel lacks: capped scores (±`softcap`), and sinks.

    The shapes are (n, num_kv_heads, num_groups x q or num_keys, head_dim), as in `_attend_group`.
    """
    scores = query @ key.transpose(2, 3) * options.scaling
    if options.softcap is not None:
        scores = (scores / options.softcap).tanh() * options.softcap
    scores = scores + mask
    if options.sinks is not None:
        num_kv_heads = key.shape[1]
        num_queries = query.shape[2] * num_kv_heads // len(options.sinks)
        sinks = options.sinks.view(num_kv_heads, -1, 1).expand(-1, -1, num_queries)
        sinks = sinks.reshape(1, num_kv_heads, -1, 1).to(scores.dtype).expand(len(scores), -1, -1, -1)
        scores = torch.cat([scores, sinks], dim=-1)
    dtype = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(dim=-1, dtype=dtype)[..., : key.shape[2]]
    return weights.to(value.dtype) @ value
