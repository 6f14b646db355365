"""Linears whose weights stand in the layout that oneDNN's products read; where there is none, they stay.

A product of 16 rows then takes two thirds of the time, of one row half.
"""

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

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


def pack(linears: Iterable[nn.Linear], *, keeps_weights: bool) -> int:
    """Packs those that can be packed, and returns how many; the values they compute stay the same.

    Without `keeps_weights`, a Linear's own `weight` is empty afterwards.
    """
    packable = [linear for linear in linears if can_pack(linear)]
    for linear in packable:
        weight = linear.weight.detach()
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _TYPICAL_NUM_ROWS)
        bias = None if linear.bias is None else linear.bias.detach()
        linear.forward = partial(_multiply, packed, bias)  # type: ignore[method-assign]
        if not keeps_weights:
            linear.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)
    return len(packable)


def _multiply(packed: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    """W x + b for `rows` (..., in)."""
    output: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
    return output
