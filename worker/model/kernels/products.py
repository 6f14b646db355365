"""The matrix products of a model's Linears, as fast as this machine computes them.

Linears that a model calls with the same rows become one product, because each call has a cost beside its
arithmetic. On a CPU, bfloat16 weights are packed, i.e. copied into the layout that oneDNN reads: a product of
16 rows then takes two thirds of the time, one of a single row half.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import msgspec
import torch
from torch import Tensor, nn
from torch.nn.functional import linear as multiply_plain

from worker.model.kernels import native
from worker.model.kernels.native import KernelState

_TYPICAL_NUM_ROWS = 16
"""Number of rows that the packed layout is chosen for; a product may have any number."""


class FusedLinears(msgspec.Struct, frozen=True):
    """Linears that one product computes."""

    first_number: int
    """The number of the first Linear; the others' follow. Kernels and graphs know Linears by number."""
    names: list[str]
    """The Linears' names in the model."""
    sees_sampled_rows: bool
    """False: the Linears see one row per token of a step. True: one row per sampled token, as an LM head
    does."""

    @property
    def numbers(self) -> dict[str, int]:
        """The number of each Linear, by name."""
        return {name: self.first_number + place for place, name in enumerate(self.names)}


def number_linears(groups: Iterable[Sequence[str]], head_names: Iterable[str]) -> list[FusedLinears]:
    """Numbers the Linears: first `groups`, which see a row per token, then the heads."""
    numbered: list[FusedLinears] = []
    number = 0
    for names, is_head in (*((group, False) for group in groups), *(([name], True) for name in head_names)):
        numbered.append(FusedLinears(number, list(names), is_head))
        number += len(names)
    return numbered


def can_pack(linear: nn.Linear) -> bool:
    """True if oneDNN has a packed layout: for bfloat16, on a CPU with instructions for it."""
    weight = linear.weight
    return (
        weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def pack(weight: Tensor) -> Tensor:
    """A weight (out, in) in the packed layout, which only oneDNN's products can read."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _TYPICAL_NUM_ROWS)
    return packed


def fuse(linears: Sequence[nn.Linear], fused: FusedLinears, kernels: KernelState | None = None) -> bool:
    """Makes `linears`, those that `fused` names, one product. Returns whether its weights are packed.

    All of them have a bias, or none. With `kernels`, the C++ kernel computes the product. Packed Linears lose
    their own `weight`, to save its memory. Heads keep theirs: an adapter that targets the head may bring a
    copy of its weight, which is compared with it.
    """
    is_packed = can_pack(linears[0])
    weight, bias = _join([linear.weight for linear in linears]), None
    if linears[0].bias is not None:
        bias = _join([linear.bias for linear in linears])
    used = pack(weight) if is_packed else weight
    if kernels is not None:
        sizes = [linear.out_features for linear in linears]
        kernels.set_linears(fused.first_number, sizes, used, bias, is_packed, fused.sees_sampled_rows)
        call_kernel(linears, fused)
    elif is_packed or len(linears) > 1:
        multiply = _multiply_packed if is_packed else _multiply
        _share(linears, partial(multiply, used, bias))
    if is_packed and not fused.sees_sampled_rows:
        for linear in linears:
            linear.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)
    return is_packed


def call_kernel(linears: Sequence[nn.Linear], fused: FusedLinears) -> None:
    """Makes `linears` call the C++ kernel, which has their weights."""
    num_outputs = sum(linear.out_features for linear in linears)
    _share(linears, partial(native.linear, fused.first_number, num_outputs))


def _join(parameters: Sequence[Tensor]) -> Tensor:
    """The parameters' values one after another, in one tensor; of several, each becomes a view of it."""
    if len(parameters) == 1:
        return parameters[0].detach()
    joined = torch.cat([parameter.detach() for parameter in parameters])
    parts = torch.split(joined, [len(parameter) for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.data = part
    return joined


def _multiply_packed(packed: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    """W x + b for `rows` (..., in)."""
    output: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
    return output


def _multiply(weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    return multiply_plain(rows, weight, bias)


def _share(linears: Sequence[nn.Linear], multiply: Callable[[Tensor], Tensor]) -> None:
    """Makes each Linear return its part of what `multiply` computes for all."""
    if len(linears) == 1:
        linears[0].forward = multiply  # type: ignore[method-assign, assignment]
        return
    shared = _SharedMatmul(multiply, [linear.out_features for linear in linears])
    for place, linear in enumerate(linears):
        linear.forward = partial(shared.take, place)  # type: ignore[method-assign]


class _SharedMatmul:
    """The product of several Linears, computed when the model calls the first of them."""

    def __init__(self, multiply: Callable[[Tensor], Tensor], sizes: list[int]) -> None:
        self._multiply = multiply
        self._sizes = sizes
        self._rows: Tensor | None = None
        self._parts: dict[int, Tensor] = {}

    def take(self, place: int, rows: Tensor) -> Tensor:
        """The output of the Linear at `place`; asked for twice, it is computed twice."""
        if rows is not self._rows or place not in self._parts:
            self._rows = rows
            self._parts = dict(enumerate(torch.split(self._multiply(rows), self._sizes, dim=-1)))
        part = self._parts.pop(place)
        if not self._parts:
            self._rows = None
        return part
