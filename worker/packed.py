"""Weights in the layout that oneDNN's products read.

A product of 16 rows then takes two thirds of the time, of one row half.
"""

from functools import partial

import torch
from torch import Tensor, nn

from worker import kernels
from worker.kernels import OperatorState

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
    linear: nn.Linear, *, sees_kept_rows: bool, operators: OperatorState | None = None, number: int = 0
) -> bool:
    """Lets a Linear compute what it did as fast as this machine can; whether its weight is packed now.

    With `operators`, it is their Linear `number` from now on. `sees_kept_rows`: see `worker.lora.LoraStack`.
    Once it is packed, its own `weight` is empty; not if it sees the kept rows, since an adapter that targets
    the head may bring a copy of its weight, which is compared with ours.
    """
    weight = linear.weight.detach()
    bias = None if linear.bias is None else linear.bias.detach()
    is_packed = can_pack(linear)
    used = pack(weight) if is_packed else weight
    if operators is not None:
        operators.set_linear(number, used, bias, is_packed, sees_kept_rows)
        call_operator(linear, number)
    elif is_packed:
        linear.forward = partial(_multiply, used, bias)  # type: ignore[method-assign]
    if is_packed and not sees_kept_rows:
        linear.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)
    return is_packed


def call_operator(linear: nn.Linear, number: int) -> None:
    """Lets a Linear call the operator that has its weight."""
    linear.forward = partial(kernels.linear, number, linear.out_features)  # type: ignore[method-assign]


def _multiply(packed: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    """W x + b for `rows` (..., in)."""
    output: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
    return output
