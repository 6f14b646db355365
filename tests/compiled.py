"""Tests that run with PyTorch's own calls, and again with the C++ kernels where there is a compiler."""

from functools import cache

import pytest
import torch

from shared.messages import ForwardState
from worker.model.kernels import native
from worker.model.model_runner import ModelRunner

WITH_AND_WITHOUT_KERNELS = pytest.mark.parametrize("has_kernels", [False, True], ids=["torch", "kernels"])


@cache
def _are_built() -> bool:
    return native.make_callable(torch.device("cpu"))


def wait_until_compiled(runner: ModelRunner) -> None:
    """Returns when a runner uses a compiled graph; it fails if there will be none."""
    runner.wait()
    assert runner.forward_state == ForwardState.COMPILED


def need_kernels() -> None:
    """Makes the kernels callable; the test is skipped where they can't be built."""
    if not _are_built():
        pytest.skip("there is no C++ compiler")
