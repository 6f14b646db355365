from copy import deepcopy

import pytest
import torch
from torch import nn

from worker.packed import can_pack, replace_product

torch.set_num_threads(1)


def make_linear(dtype: torch.dtype, *, bias: bool) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(48, 33, bias=bias, dtype=dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 48), (1, 16, 48), (70, 48), (1, 0, 48)], ids=str)
@torch.inference_mode()
def test_a_packed_linear_computes_what_it_did(shape: tuple[int, ...], bias: bool) -> None:
    linear = make_linear(torch.bfloat16, bias=bias)
    if not can_pack(linear):
        pytest.skip("no bfloat16 products of oneDNN here")
    plain = deepcopy(linear)
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert replace_product(linear, sees_kept_rows=False)
    assert linear.weight.numel() == 0
    torch.testing.assert_close(linear(rows), plain(rows))


def test_other_precisions_stay_as_they_are() -> None:
    linear = make_linear(torch.float64, bias=True)
    weight = linear.weight
    assert not replace_product(linear, sees_kept_rows=False)
    assert linear.weight is weight
    assert weight.numel() == 48 * 33


def test_a_weight_that_is_read_elsewhere_is_kept() -> None:
    linear = make_linear(torch.bfloat16, bias=False)
    weight = linear.weight
    replace_product(linear, sees_kept_rows=True)
    assert linear.weight is weight
