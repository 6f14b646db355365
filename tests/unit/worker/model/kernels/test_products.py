import weakref
from copy import deepcopy

import pytest
import torch
from torch import nn

from worker.model.kernels.products import FusedLinears, can_pack, fuse

torch.set_num_threads(1)

ONE, HEAD = (
    FusedLinears(0, ["one"], sees_sampled_rows=False),
    FusedLinears(0, ["head"], sees_sampled_rows=True),
)
SEVERAL = FusedLinears(0, ["one", "two", "three"], sees_sampled_rows=False)


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
    assert fuse([linear], ONE)
    assert linear.weight.numel() == 0
    torch.testing.assert_close(linear(rows), plain(rows))


def test_other_precisions_stay_as_they_are() -> None:
    linear = make_linear(torch.float64, bias=True)
    weight = linear.weight
    assert not fuse([linear], ONE)
    assert linear.weight is weight
    assert weight.numel() == 48 * 33


def test_a_weight_that_is_read_elsewhere_is_kept() -> None:
    linear = make_linear(torch.bfloat16, bias=False)
    weight = linear.weight
    fuse([linear], HEAD)
    assert linear.weight is weight


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@torch.inference_mode()
def test_linears_that_see_the_same_rows_are_one_product(dtype: torch.dtype, bias: bool) -> None:
    linears = [nn.Linear(48, size, bias=bias, dtype=dtype) for size in (33, 16, 40)]
    plain = deepcopy(linears)
    fuse(linears, SEVERAL)
    generator = torch.Generator().manual_seed(1)
    for first in range(3):  # in another order each time, with other rows, one of them twice
        rows, others = (torch.randn(1, 5, 48, generator=generator).to(dtype) for _ in range(2))
        for place in (first, (first + 1) % 3, first, (first + 2) % 3):
            torch.testing.assert_close(linears[place](rows), plain[place](rows))
        torch.testing.assert_close(linears[first](others), plain[first](others))


@torch.inference_mode()
def test_the_rows_of_a_product_are_multiplied_once_and_not_kept() -> None:
    linears = [nn.Linear(4, 4, dtype=torch.float64) for _ in range(2)]
    fuse(linears, SEVERAL)
    rows = torch.ones(3, 4, dtype=torch.float64)
    one, other = (linear(rows) for linear in linears)
    assert one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    kept = weakref.ref(rows)
    del rows
    assert kept() is None


def test_linears_joined_but_not_packed_keep_weights_that_can_be_read() -> None:
    linears = [make_linear(torch.float64, bias=True) for _ in range(2)]
    plain = deepcopy(linears)
    fuse(linears, SEVERAL)
    assert all(torch.equal(one.weight, other.weight) for one, other in zip(linears, plain, strict=True))
