"""Makes the matmuls of a model's Linears faster by fusing Linears and by packing weights.

Linears that read the same input rows are fused into one matmul, because each matmul has overhead. On a CPU,
bfloat16 weights are packed: they are copied into oneDNN's memory layout. With packed weights, a matmul of 16
rows takes two thirds of the time that it takes with plain weights, and a matmul of one row takes half of the
time.
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
"""Number of rows for which the packed layout is optimal; a matmul may have any number of rows."""


class FusedLinears(msgspec.Struct, frozen=True):
    """Linears that read the same input and are computed as one matmul, or a single Linear."""

    first_number: int
    """Number of the first Linear; the other Linears have the next numbers. Kernels and graphs use numbers."""
    names: list[str]
    """Names of the Linears in the model."""
    sees_sampled_rows: bool
    """True if the Linears get one row per sampled token, like an LM head; False if they get one row per token
    of the step."""

    @property
    def numbers(self) -> dict[str, int]:
        """Number of each Linear, by name."""
        return {name: self.first_number + index for index, name in enumerate(self.names)}


def number_linears(groups: Iterable[Sequence[str]], head_names: Iterable[str]) -> list[FusedLinears]:
    """Numbers the Linears: first those in `groups`, whose inputs have a row per token, then the heads."""
    numbered: list[FusedLinears] = []
    number = 0
    for names, is_head in (*((group, False) for group in groups), *(([name], True) for name in head_names)):
        numbered.append(FusedLinears(number, list(names), is_head))
        number += len(names)
    return numbered


def can_pack(linear: nn.Linear) -> bool:
    """True if oneDNN can pack the weight: it must be bfloat16, on a CPU that supports bfloat16."""
    weight = linear.weight
    return (
        weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def pack(weight: Tensor) -> Tensor:
    """Returns a weight (out, in) in the packed layout, which only oneDNN's matmul can read."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _TYPICAL_NUM_ROWS)
    return packed


def fuse(linears: Sequence[nn.Linear], fused: FusedLinears, kernels: KernelState | None = None) -> bool:
    """Fuses `linears` (the layers that `fused` lists) into one matmul; returns True if they are packed.

    Either all Linears have a bias or none has one. With `kernels`, the C++ kernel computes the matmul. Packed
    Linears lose their plain `weight`, to save memory. A head keeps its `weight`, because adapters that target
    the head may contain a copy of it, which is compared with it.
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
    """Makes `linears` call the C++ kernel; `set_linears` must have given their weights to the kernel."""
    num_outputs = sum(linear.out_features for linear in linears)
    _share(linears, partial(native.linear, fused.first_number, num_outputs))


def _join(parameters: Sequence[Tensor]) -> Tensor:
    """Concatenates parameters in one tensor. Each parameter becomes a view of this tensor, to save memory."""
    if len(parameters) == 1:
        return parameters[0].detach()
    joined = torch.cat([parameter.detach() for parameter in parameters])
    parts = torch.split(joined, [len(parameter) for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.data = part
    return joined


def _multiply_packed(packed: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    """Computes W x + b for `rows` (..., in)."""
    output: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
    return output


def _multiply(weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    return multiply_plain(rows, weight, bias)


def _share(linears: Sequence[nn.Linear], multiply: Callable[[Tensor], Tensor]) -> None:
    """Makes `multiply` compute all Linears at once; each Linear returns its part of the result."""
    if len(linears) == 1:
        linears[0].forward = multiply  # type: ignore[method-assign, assignment]
        return
    shared = _SharedMatmul(multiply, [linear.out_features for linear in linears])
    for index, linear in enumerate(linears):
        linear.forward = partial(shared.take, index)  # type: ignore[method-assign]


class _SharedMatmul:
    """One matmul for several Linears, computed when the model calls the first of them."""

    def __init__(self, multiply: Callable[[Tensor], Tensor], sizes: list[int]) -> None:
        self._multiply = multiply
        self._sizes = sizes
        self._rows: Tensor | None = None
        self._parts: dict[int, Tensor] = {}

    def take(self, index: int, rows: Tensor) -> Tensor:
        """Returns the output of Linear `index`.

        A second call for the same Linear computes the matmul again.
        """
        if rows is not self._rows or index not in self._parts:
            self._rows = rows
            self._parts = dict(enumerate(torch.split(self._multiply(rows), self._sizes, dim=-1)))
        part = self._parts.pop(index)
        if not self._parts:
            self._rows = None
        return part
