"""LoRA in a mixed batch, in which each row of a layer's input gets the adapter of its own sequence.

A Linear with an adapter computes y = W x + scale · B (A x). The A and B of all adapters of a layer are
stacked. The rows of a long prompt chunk are multiplied with their own adapter's part of the stack. All other
rows, called short rows, are computed together, by the C++ kernel if there is one. Without the kernel, the
short rows are multiplied with the stacked A of all their adapters. In each row of this product, only the
columns of the row's own adapter are kept, and all other columns are set to 0. The product is then multiplied
with the stacked B.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shared.errors import AdapterError
from worker.model.adapter_files import LoadedAdapter
from worker.model.kernels.native import KernelState
from worker.model.kernels.products import FusedLinears

BASE = -1
"""The slot number of rows without an adapter."""
MIN_LONG_ROWS = 256
"""Minimum number of rows of a prompt chunk that gets separate matmuls; for a shorter chunk, the hundreds of
additional calls per step cost more than they save."""


class Span(NamedTuple):
    """Consecutive rows with the same adapter."""

    slot: int
    first: int
    num_rows: int


class StepRows:
    """The adapter slot of each row of a layer's input, in one forward pass."""

    def __init__(self, spans: Iterable[tuple[int, int]], device: torch.device) -> None:
        """`spans`: (slot, number of rows) of each sequence, in the order of the rows."""
        self.long_spans: list[Span] = []
        """Spans of at least `MIN_LONG_ROWS` rows that have an adapter."""
        self._short_rows: list[int] = []
        self._short_slots: list[int] = []
        self._device = device
        self._masks: dict[tuple[int, ...], Tensor] = {}
        first = 0
        for slot, num_rows in spans:
            if num_rows < MIN_LONG_ROWS:
                self._short_rows += range(first, first + num_rows)
                self._short_slots += [slot] * num_rows
            elif slot != BASE:
                self.long_spans.append(Span(slot, first, num_rows))
            first += num_rows
        self.short_row_slots = tuple(sorted(set(self._short_slots) - {BASE}))
        """Slots of the adapters of short rows, ascending."""
        self.is_mixed = len(set(self._short_slots)) > 1
        """True if short rows differ in their slots; `BASE` counts as a slot."""

    @property
    def has_adapters(self) -> bool:
        """True if any row has an adapter."""
        return bool(self.short_row_slots or self.long_spans)

    @cached_property
    def short_rows(self) -> slice | Tensor:
        """Indices of the short rows; a slice if they are contiguous."""
        numbers = self._short_rows
        if numbers and numbers[-1] - numbers[0] + 1 == len(numbers):
            return slice(numbers[0], numbers[-1] + 1)
        return _integers(numbers).to(self._device)

    def foreign_columns(self, column_slots: tuple[int, ...]) -> Tensor:
        """Returns a mask (num_short_rows, num_columns): true where column and row belong to different slots.

        Layers whose adapters have the same ranks share one tensor.
        """
        if column_slots not in self._masks:
            rows = torch.tensor(self._short_slots, device=self._device)
            columns = torch.tensor(column_slots, device=self._device)
            self._masks[column_slots] = rows[:, None] != columns
        return self._masks[column_slots]

    def as_tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the arguments of `KernelState.set_adapter_rows`: index, runs, long spans.

        `index` lists the short rows with an adapter, ordered by slot. A run (slot, first, count) tells which
        part of `index` has the rows of a slot. A long span is (slot, first row, number of rows).
        """
        index: list[int] = []
        runs: list[Span] = []
        for slot in self.short_row_slots:
            rows = [
                row for row, owner in zip(self._short_rows, self._short_slots, strict=True) if owner == slot
            ]
            runs.append(Span(slot, len(index), len(rows)))
            index += rows
        return _integers(index), _integers(runs).view(-1, 3), _integers(self.long_spans).view(-1, 3)


def _integers(values: Sequence[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.long)


class _Part(NamedTuple):
    """The stacked A and B of the adapters in some of the slots."""

    a: Tensor
    b: Tensor
    rank_slots: tuple[int, ...]
    """The slot that each row of `a` and `b` belongs to."""


class LoraLayer:
    """The adapters of one Linear.

    A forward hook or a C++ kernel adds their outputs to the Linear's output.
    """

    def __init__(
        self, linear: nn.Linear, number: int, dtype: torch.dtype, kernels: KernelState | None
    ) -> None:
        """Starts without adapters; `number` is the Linear's number in `FusedLinears.numbers`."""
        device = linear.weight.device
        self.rows: StepRows | None = None
        """The step's rows, set before each forward pass without kernels; None if no row has an adapter."""
        self._kernels = kernels
        self._number = number
        self._ranks: dict[int, range] = {}
        """Rows of the stacked A and B that belong to each slot."""
        self._a = torch.empty(0, linear.in_features, dtype=dtype, device=device)  # (sum of ranks, in)
        self._b = torch.empty(
            0, linear.out_features, dtype=dtype, device=device
        )  # (sum of ranks, out), scaled
        self._last_part: tuple[tuple[int, ...], _Part] | None = None
        """Slots of the last step and their `_part`; cached, since the next step mostly has the same slots."""
        if kernels is None:
            linear.register_forward_hook(self._add_to_output)

    def put(self, slot: int, a: Tensor, b: Tensor) -> None:
        """Replaces the adapter in a slot by `a` (rank, in) and `b` (rank, out), which includes the scale."""
        self._last_part = None
        ranks = self._ranks.get(slot, range(0))
        if len(ranks) == len(a):
            self._a[ranks.start : ranks.stop] = a
            self._b[ranks.start : ranks.stop] = b
            return
        self.remove(slot)
        # If A were assigned before B is created, and memory ran out then, A and B would have different ranks.
        stacked = torch.cat([self._a, a.to(self._a)]), torch.cat([self._b, b.to(self._b)])
        self._ranks[slot] = range(len(self._a), len(self._a) + len(a))
        self._a, self._b = stacked
        self._tell_kernels()

    def remove(self, slot: int) -> None:
        """Removes the adapter in a slot, if there is one."""
        ranks = self._ranks.get(slot)
        if ranks is None:
            return
        self._last_part = None
        self._a, self._b = (
            torch.cat([stacked[: ranks.start], stacked[ranks.stop :]]) for stacked in (self._a, self._b)
        )
        del self._ranks[slot]
        for other, owned in self._ranks.items():
            if owned.start > ranks.start:
                self._ranks[other] = range(owned.start - len(ranks), owned.stop - len(ranks))
        self._tell_kernels()

    def _part(self, slots: Iterable[int]) -> _Part:
        owned = sorted((self._ranks[slot].start, slot) for slot in slots if slot in self._ranks)
        rank_slots = tuple(slot for _, slot in owned for _ in self._ranks[slot])
        ranks = [rank for _, slot in owned for rank in self._ranks[slot]]
        if not ranks or ranks[-1] - ranks[0] + 1 == len(ranks):  # contiguous: views, no copy
            part = slice(ranks[0], ranks[-1] + 1) if ranks else slice(0)
            return _Part(self._a[part], self._b[part], rank_slots)
        index = torch.tensor(ranks, device=self._a.device)
        return _Part(self._a[index], self._b[index], rank_slots)

    def _add_to_output(self, linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        rows = self.rows
        if rows is None or not self._ranks:
            return
        # The output can be changed in place: the Linear has just created it, and no other code has it yet.
        x, y = inputs[0].flatten(0, -2), output.view(-1, output.shape[-1])
        for slot, first, num_rows in rows.long_spans:
            if slot in self._ranks:
                part, span = self._part((slot,)), slice(first, first + num_rows)
                y[span].add_(x[span] @ part.a.T @ part.b)
        if rows.short_row_slots:
            self._add_to_short_rows(x, y, rows)

    def _add_to_short_rows(self, x: Tensor, y: Tensor, rows: StepRows) -> None:
        slots = rows.short_row_slots
        if self._last_part is None or self._last_part[0] != slots:
            self._last_part = (slots, self._part(slots))
        part = self._last_part[1]
        if not part.rank_slots:
            return
        low = x[rows.short_rows] @ part.a.T  # (number of short rows, sum of ranks)
        if rows.is_mixed:
            # With a multiplication by 0 instead, an overflow in a foreign column would make the row NaN.
            low = low.masked_fill(rows.foreign_columns(part.rank_slots), 0)
        if isinstance(rows.short_rows, slice):
            y[rows.short_rows].add_(low @ part.b)
        else:
            y.index_add_(0, rows.short_rows, low @ part.b)

    def _tell_kernels(self) -> None:
        if self._kernels is not None:
            num_slots = max(self._ranks, default=-1) + 1
            owned = [self._ranks.get(slot, range(0)) for slot in range(num_slots)]
            ranks = _integers([(ranks.start, len(ranks)) for ranks in owned]).view(-1, 2)
            self._kernels.set_adapters(self._number, self._a, self._b, ranks)


@dataclass(frozen=True)
class SlotWeights:
    """An adapter's weights in host memory, ready to be copied into a slot."""

    layers: Mapping[str, tuple[Tensor, Tensor]]
    """A (rank, in) and B (rank, out) by the Linear's name, in the model's dtype; B includes the scale."""

    @property
    def num_bytes(self) -> int:
        """Number of bytes of the weights, which is the same in host memory and in a slot."""
        return sum(a.nbytes + b.nbytes for a, b in self.layers.values())


class LoraStack:
    """A model's adapter slots. A slot holds one adapter's weights for all Linears that the adapter changes.

    `AdapterCache` decides which adapter is in which slot; this class knows no adapter names.
    """

    def __init__(
        self,
        model: nn.Module,
        fused_linears: Sequence[FusedLinears],
        dtype: torch.dtype,
        kernels: KernelState | None = None,
    ) -> None:
        """Starts with empty slots. Adapters may change only Linears in `fused_linears`."""
        self._kernels = kernels
        self._numbers = {name: number for fused in fused_linears for name, number in fused.numbers.items()}
        self._linears = {name: _linear(model, name) for name in self._numbers}
        self._heads = {name for fused in fused_linears if fused.sees_sampled_rows for name in fused.names}
        devices = (linear.weight.device for linear in self._linears.values())
        self._device = next(devices, torch.device("cpu"))
        self._dtype = dtype
        self._layers: dict[str, LoraLayer] = {}

    def prepare(self, name: str, adapter: LoadedAdapter) -> SlotWeights:
        """Scales and converts an adapter's weights for `put`; may be called from any thread.

        Raises:
            AdapterError: the weights are not finite in the model's dtype, or the adapter changes a layer that
                does not get all tokens of the batch in their order, such as an expert.
        """
        prepared: dict[str, tuple[Tensor, Tensor]] = {}
        for layer, weights in adapter.layers.items():
            if layer not in self._linears:
                raise AdapterError(
                    f"adapter {name!r} at {adapter.path}: changes {layer}, whose input is not the batch's "
                    "tokens in their order (a layer of an expert?); that is not served"
                )
            # B is scaled in the finer of the adapter's and the model's precision. The results are copies: as
            # views, they would keep the whole file's content in memory.
            finest = torch.promote_types(weights.b.dtype, self._dtype)
            a = weights.a.to(self._dtype, copy=True)
            b = (weights.b.to(finest) * weights.scaling).T.to(self._dtype).contiguous()
            for side, ready, read in (("A", a, weights.a), ("B", b, weights.b)):
                if not _is_finite(ready):
                    overflows = (
                        f"overflows {self._dtype}" if _is_finite(read) else "has NaN or infinite weights"
                    )
                    raise AdapterError(f"adapter {name!r} at {adapter.path}: {layer}.lora_{side} {overflows}")
            prepared[layer] = (a, b)
        return SlotWeights(prepared)

    @torch.inference_mode()
    def put(self, slot: int, weights: SlotWeights) -> None:
        """Replaces the contents of a slot; the next forward pass uses the new weights."""
        for layer in self._layers.keys() - weights.layers.keys():
            self._layers[layer].remove(slot)
        for layer, (a, b) in weights.layers.items():
            if layer not in self._layers:
                self._layers[layer] = LoraLayer(
                    self._linears[layer], self._numbers[layer], self._dtype, self._kernels
                )
            self._layers[layer].put(slot, a, b)

    def set_rows(self, spans: Sequence[tuple[int, int]], sampled_rows: Sequence[int]) -> None:
        """Sets the slot of each token of the next forward pass, and the slots of the tokens that get logits.

        `spans` has (slot, number of tokens) of each sequence, in the order of the tokens.
        """
        token_rows = StepRows(spans, self._device)
        head_rows = StepRows([(slot, 1) for slot in _slots_of(spans, sampled_rows)], self._device)
        if self._kernels is not None:
            self._kernels.set_adapter_rows(False, *token_rows.as_tensors())
            self._kernels.set_adapter_rows(True, *head_rows.as_tensors())
            return
        for name, lora_layer in self._layers.items():
            rows = head_rows if name in self._heads else token_rows
            lora_layer.rows = rows if rows.has_adapters else None


def _is_finite(tensor: Tensor) -> bool:
    """True if every entry is finite. The usual `isfinite().all()` would take ten times as long.

    `aminmax` returns NaN if any entry is NaN.
    """
    smallest, largest = tensor.aminmax()
    return math.isfinite(smallest) and math.isfinite(largest)


def _slots_of(spans: Iterable[tuple[int, int]], tokens: Iterable[int]) -> list[int]:
    slots = [slot for slot, num_tokens in spans for _ in range(num_tokens)]
    return [slots[token] for token in tokens]


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Returns a model's Linears by name, without subclasses that compute something else, such as routers."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    }
