"""LoRA in a mixed batch: each row of a layer's input gets the adapter of its own sequence.

y = W x + scale · B (A x). The A and B of all adapters of a layer stand stacked. A long span of a
prompt is multiplied with those of its own adapter. All other rows are computed together: by a kernel, where
there is one, else in one product with all adapters that they use, of which each row keeps its own part.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import AdapterError
from worker.model.adapter_files import LoadedAdapter
from worker.model.kernels.native import OperatorState

BASE = -1
"""The slot of rows without an adapter."""
MIN_LONG_ROWS = 256
"""So many rows of one sequence are worth products of their own: these are hundreds of further calls."""


class StepRows:
    """Which adapter each row of a layer's input belongs to, for one forward pass."""

    def __init__(self, spans: Iterable[tuple[int, int]], device: torch.device) -> None:
        """`spans`: (slot, number of rows) of each sequence, in the order of the rows."""
        self._device = device
        self.long_spans: list[tuple[int, slice]] = []
        """Slot and rows of each."""
        numbers: list[int] = []
        slots: list[int] = []
        first = 0
        for slot, num_rows in spans:
            if num_rows >= MIN_LONG_ROWS:
                self.long_spans += [(slot, slice(first, first + num_rows))] if slot != BASE else []
            else:
                numbers += range(first, first + num_rows)
                slots += [slot] * num_rows
            first += num_rows
        self._numbers, self._slots = numbers, slots
        self.used = tuple(sorted(set(slots) - {BASE}))
        """The slots of the short spans' rows, here called single rows."""
        self.is_uniform = len(set(slots)) == 1
        is_contiguous = not numbers or numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        self.singles = (
            slice(numbers[0], numbers[0] + len(numbers))
            if numbers and is_contiguous
            else torch.tensor(numbers, dtype=torch.long, device=device)
        )
        """Where the single rows are."""
        self._masks: dict[tuple[int, ...], Tensor] = {}

    @property
    def has_adapters(self) -> bool:
        """Whether any row has one."""
        return bool(self.used or self.long_spans)

    def foreign(self, rank_slots: tuple[int, ...]) -> Tensor:
        """(number of single rows, sum of ranks): whether a rank belongs to another adapter than the row.

        The same tensor for all layers whose adapters have the same ranks.
        """
        if rank_slots not in self._masks:
            rows = torch.tensor(self._slots, device=self._device)
            ranks = torch.tensor(rank_slots, device=self._device)
            self._masks[rank_slots] = rows[:, None] != ranks
        return self._masks[rank_slots]

    def as_tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """For the operators: the single rows with an adapter in order of their slots; runs; long spans.

        A run (slot, first, number) is a slot's part of those rows; a long span has the same fields.
        """
        index: list[int] = []
        runs: list[tuple[int, int, int]] = []
        for slot in self.used:
            rows = [row for row, owner in zip(self._numbers, self._slots, strict=True) if owner == slot]
            runs.append((slot, len(index), len(rows)))
            index += rows
        long_spans = [(slot, rows.start, rows.stop - rows.start) for slot, rows in self.long_spans]
        return _integers(index), _integers(runs).view(-1, 3), _integers(long_spans).view(-1, 3)


def _integers(values: Sequence[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.long)


class LoraLayer:
    """The adapters of one Linear, added to its output by a forward hook or by the operators."""

    rows: StepRows | None = None
    """Set before each forward pass; None where no row has an adapter. Operators know by themselves."""

    def __init__(
        self, linear: nn.Linear, dtype: torch.dtype, operators: OperatorState | None, number: int
    ) -> None:
        """`number`: the Linear's, for the operators."""
        device = linear.weight.device
        self._operators = operators
        self._number = number
        self._rank_slots: tuple[int, ...] = ()
        """The slot that owns each rank, i.e. each row of A and B."""
        self._a = torch.empty(0, linear.in_features, dtype=dtype, device=device)  # (sum of ranks, in)
        self._b = torch.empty(
            0, linear.out_features, dtype=dtype, device=device
        )  # (sum of ranks, out), scaled
        self._selected: tuple[tuple[int, ...], tuple[Tensor, Tensor, tuple[int, ...]]] | None = None
        if operators is None:
            linear.register_forward_hook(self._add_to_output)

    def add(self, slot: int, a: Tensor, b: Tensor) -> None:
        """Stacks an adapter in place of the slot's former one: `a` (rank, in) and `b` (rank, out), scaled."""
        self._selected = None
        if self._rank_slots.count(slot) == len(a):
            first = self._rank_slots.index(slot)
            self._a[first : first + len(a)] = a
            self._b[first : first + len(a)] = b
            return
        self.remove(slot)
        # Both or none: the second may find no memory.
        stacked = torch.cat([self._a, a.to(self._a)]), torch.cat([self._b, b.to(self._b)])
        self._a, self._b = stacked
        self._rank_slots += (slot,) * len(a)
        self._tell_operators()

    def remove(self, slot: int) -> None:
        """Takes an adapter out; one that isn't here is no error."""
        if slot not in self._rank_slots:
            return
        self._a, self._b, self._rank_slots = self._select(tuple(set(self._rank_slots) - {slot}))
        self._selected = None
        self._tell_operators()

    def _select(self, used: tuple[int, ...]) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        kept = [n for n, slot in enumerate(self._rank_slots) if slot in used]
        if not kept or kept[-1] - kept[0] + 1 == len(kept):  # neighbours: views, no copy
            part = slice(kept[0], kept[-1] + 1) if kept else slice(0)
            return self._a[part], self._b[part], self._rank_slots[part]
        index = torch.tensor(kept, device=self._a.device)
        return self._a[index], self._b[index], tuple(self._rank_slots[n] for n in kept)

    def _add_to_output(self, linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        rows = self.rows
        if rows is None or not self._rank_slots:
            return
        # The output is fresh, no need of another.
        x, y = inputs[0].flatten(0, -2), output.view(-1, output.shape[-1])
        for slot, part in rows.long_spans:
            a, b, rank_slots = self._select((slot,))
            if rank_slots:
                y[part].add_(x[part] @ a.T @ b)
        if rows.used:
            self._add_to_singles(x, y, rows)

    def _add_to_singles(self, x: Tensor, y: Tensor, rows: StepRows) -> None:
        if self._selected is None or self._selected[0] != rows.used:
            self._selected = (rows.used, self._select(rows.used))
        a, b, rank_slots = self._selected[1]
        if not rank_slots:
            return
        low = x[rows.singles] @ a.T  # (number of single rows, sum of ranks)
        if not rows.is_uniform:
            # Not a product with zeros: what overflows in one adapter must not become NaN in another's row.
            low = low.masked_fill(rows.foreign(rank_slots), 0)
        if isinstance(rows.singles, slice):
            y[rows.singles].add_(low @ b)
        else:
            y.index_add_(0, rows.singles, low @ b)

    def _tell_operators(self) -> None:
        if self._operators is not None:
            owners = self._rank_slots
            slots = range(max(owners, default=-1) + 1)
            ranks = [(owners.index(slot), owners.count(slot)) if slot in owners else (0, 0) for slot in slots]
            self._operators.set_adapters(self._number, self._a, self._b, _integers(ranks).view(-1, 2))


@dataclass(frozen=True)
class SlotWeights:
    """An adapter in host memory, as a slot takes it."""

    layers: Mapping[str, tuple[Tensor, Tensor]]
    """By layer: A (rank, in) and B (rank, out), the scale folded into B, in the model's dtype."""

    @property
    def num_bytes(self) -> int:
        """Its size, in host memory as in a slot."""
        return sum(a.nbytes + b.nbytes for a, b in self.layers.values())


class LoraStack:
    """All resident adapters of a model.

    `token_layers` and `kept_layers` are the Linears by name that see all tokens of a step, and those behind
    `logits_to_keep` that see its sampled rows only.
    """

    def __init__(
        self,
        token_layers: Mapping[str, nn.Linear],
        kept_layers: Mapping[str, nn.Linear],
        dtype: torch.dtype,
        operators: OperatorState | None = None,
    ) -> None:
        """`operators`: those of `kernels.native` that compute these Linears, numbered in this order."""
        self._operators = operators
        self._linears = {**token_layers, **kept_layers}
        self._numbers = {name: number for number, name in enumerate(self._linears)}
        devices = (linear.weight.device for linear in self._linears.values())
        self._device = next(devices, torch.device("cpu"))
        self._kept_names = frozenset(kept_layers)
        self._dtype = dtype
        self._layers: dict[str, LoraLayer] = {}
        self._slots: dict[str, int] = {}

    def prepare(self, name: str, adapter: LoadedAdapter) -> SlotWeights:
        """An adapter as `put` takes it; may be called in any thread.

        Raises:
            AdapterError: it changes a layer whose input is not the rows of the batch (an expert's), or its
                weights are not finite in the model's dtype.
        """
        prepared: dict[str, tuple[Tensor, Tensor]] = {}
        for layer, weights in adapter.layers.items():
            if layer not in self._linears:
                raise AdapterError(
                    f"adapter {name!r} at {adapter.path}: changes {layer}, whose input is not the batch's "
                    "tokens in their order (a layer of an expert?); that is not served"
                )
            # Scaled in the adapter's own or the model's precision, whichever is finer. Copies, since what was
            # read may be a view of the file.
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

    def add(self, name: str, adapter: LoadedAdapter) -> None:
        """Makes an adapter resident; it can be used from the next step on.

        Raises:
            AdapterError: see `prepare`; nothing was changed then.
        """
        self.put(name, self.prepare(name, adapter))

    @torch.inference_mode()
    def put(self, name: str, weights: SlotWeights) -> None:
        """Makes a prepared adapter resident, in the slot of a removed one if there is any."""
        self.remove(name)
        slot = min(set(range(len(self._slots) + 1)) - set(self._slots.values()))
        self._slots[name] = slot
        for layer in self._layers.keys() - weights.layers.keys():
            self._layers[layer].remove(slot)
        for layer, (a, b) in weights.layers.items():
            if layer not in self._layers:
                self._layers[layer] = LoraLayer(
                    self._linears[layer], self._dtype, self._operators, self._numbers[layer]
                )
            self._layers[layer].add(slot, a, b)

    def remove(self, name: str) -> None:
        """Forgets an adapter, if it is here; its weights stay until the slot is taken."""
        self._slots.pop(name, None)

    def slot(self, name: str | None) -> int:
        """The slot of a resident adapter; of None, `BASE`.

        Raises:
            AdapterError: the adapter is not resident.
        """
        if name is None:
            return BASE
        if name not in self._slots:
            raise AdapterError(f"adapter {name!r} is not loaded")
        return self._slots[name]

    def set_rows(self, spans: Sequence[tuple[int, int]], kept: Sequence[int]) -> None:
        """Says whose tokens the next forward has, and which tokens' logits are kept.

        `spans`: (slot, number of tokens) of each sequence, in the order of the tokens.
        """
        rows = StepRows(spans, self._device)
        kept_rows = StepRows([(slot, 1) for slot in _slots_of(spans, kept)], self._device)
        if self._operators is not None:
            self._operators.set_adapter_rows(False, *rows.as_tensors())
            self._operators.set_adapter_rows(True, *kept_rows.as_tensors())
            return
        for name, lora_layer in self._layers.items():
            of_layer = kept_rows if name in self._kept_names else rows
            lora_layer.rows = of_layer if of_layer.has_adapters else None


def _is_finite(tensor: Tensor) -> bool:
    """A tenth of the time of `isfinite().all()`: NaN is the largest and the smallest of what it is among."""
    smallest, largest = tensor.aminmax()
    return math.isfinite(smallest) and math.isfinite(largest)


def _slots_of(spans: Iterable[tuple[int, int]], tokens: Iterable[int]) -> list[int]:
    slots = [slot for slot, num_tokens in spans for _ in range(num_tokens)]
    return [slots[token] for token in tokens]


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The Linear modules of a model by name."""
    found: dict[str, Any] = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    return found
