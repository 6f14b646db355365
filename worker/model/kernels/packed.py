"""The products of Linears, as fast as this machine can.

Linears that a model calls with the same rows are one product: each has its cost beside what it computes. On a
CPU, weights get the layout that oneDNN's products read: one of 16 rows then takes two thirds of the time, of
one row half.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as multiply_plain

from worker.model.kernels import native
from worker.model.kernels.native import OperatorState

_TYPICAL_NUM_ROWS = 16
"""What the layout is chosen for; any number of rows is right."""


def can_pack(linear: nn.Linear) -> bool:
    """Whether this device and precision have such a layout: bfloat16 on a CPU with instructions for it."""
    weight = linear.weight
    return (
        weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def pack(weight: Tensor) -> Tensor:
    """A weight (out, in) in that layout; only such products can read it."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _TYPICAL_NUM_ROWS)
    return packed


def replace_product(
    linears: Sequence[nn.Linear],
    *,
    sees_kept_rows: bool,
    operators: OperatorState | None = None,
    number: int = 0,
) -> bool:
    """Lets Linears that see the same rows compute what they did in one product; whether it is packed now.

    All or none have a bias. With `operators`, they are their Linears `number` and following from now on.
    `sees_kept_rows`: see `model.lora.LoraStack`. Once they are packed, their own `weight` is empty; not if
    they see the kept rows, since an adapter that targets the head may bring a copy of its weight, which is
    compared with ours.
    """
    is_packed = can_pack(linears[0])
    weight, bias = _join([linear.weight for linear in linears]), None
    if linears[0].bias is not None:
        bias = _join([linear.bias for linear in linears])
    used = pack(weight) if is_packed else weight
    if operators is not None:
        sizes = [linear.out_features for linear in linears]
        operators.set_linears(number, sizes, used, bias, is_packed, sees_kept_rows)
        call_operator(linears, number)
    elif is_packed or len(linears) > 1:
        multiply = _multiply_packed if is_packed else _multiply
        _share(linears, partial(multiply, used, bias))
    if is_packed and not sees_kept_rows:
        for linear in linears:
            linear.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)
    return is_packed


def call_operator(linears: Sequence[nn.Linear], number: int) -> None:
    """Lets Linears that see the same rows call the operator that has their weights."""
    _share(linears, partial(native.linear, number, sum(linear.out_features for linear in linears)))


def _join(parameters: Sequence[Tensor]) -> Tensor:
    """Their values one after another; where there are several, the parameters become parts of it."""
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


def _share(linears: Sequence[nn.Linear], product: Callable[[Tensor], Tensor]) -> None:
    """Lets the Linears return their parts of a product of all."""
    if len(linears) == 1:
        linears[0].forward = product  # type: ignore[method-assign, assignment]
        return
    shared = _SharedProduct(product, [linear.out_features for linear in linears])
    for place, linear in enumerate(linears):
        linear.forward = partial(shared.take, place)  # type: ignore[method-assign]


class _SharedProduct:
    """The product of several Linears, computed when the first of them is called."""

    def __init__(self, product: Callable[[Tensor], Tensor], sizes: list[int]) -> None:
        self._product = product
        self._sizes = sizes
        self._rows: Tensor | None = None
        self._parts: dict[int, Tensor] = {}

    def take(self, place: int, rows: Tensor) -> Tensor:
        """The part of the Linear at `place`: each is given away once."""
        if rows is not self._rows or place not in self._parts:
            self._rows = rows
            self._parts = dict(enumerate(torch.split(self._product(rows), self._sizes, dim=-1)))
        part = self._parts.pop(place)
        if not self._parts:
            self._rows = None
        return part
