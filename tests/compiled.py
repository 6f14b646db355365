"""Tests that run with PyTorch's own calls, and again with the C++ kernels where there is a compiler."""

from functools import cache

import pytest
import torch

from worker import kernels

WITH_AND_WITHOUT_KERNELS = pytest.mark.parametrize("has_kernels", [False, True], ids=["torch", "kernels"])


@cache
def _are_built() -> bool:
    return kernels.make_callable(torch.device("cpu"))


def need_kernels() -> None:
    """Makes the kernels callable; the test is skipped where they can't be built."""
    if not _are_built():
        pytest.skip("there is no C++ compiler")
