"""Settings of OpenMP, PyTorch's thread pool. Loading torch reads them, so this module does not import it."""

import os
import shutil
from collections.abc import MutableMapping

COMPILER = "g++"
"""The kernels' compiler. Its OpenMP is PyTorch's; threads of a second OpenMP would compete for the cores."""

_CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_SPIN_COUNT = 1000
"""Iterations of a few microseconds in all: a compiled step's threads rarely wait longer for each other."""
_EAGER_SPIN_COUNT = 6000
"""Longer, because an eager step runs Python between its operations. Waking threads for each would cost a
fifth of the step."""


def sleep_while_waiting(*, is_eager: bool = False, environ: MutableMapping[str, str] = os.environ) -> None:
    """Makes waiting threads sleep after a short spin, unless the operator's environment says otherwise.

    Call it before torch loads. By default they spin for long. When another process takes one of their cores,
    the other threads spin until it returns, in every operation, and a step takes ten times as long.
    """
    if not any(choice in environ for choice in _CHOICES):
        environ["OMP_WAIT_POLICY"] = "passive"
        environ["GOMP_SPINCOUNT"] = str(_EAGER_SPIN_COUNT if is_eager else _SPIN_COUNT)


def stays_eager(compile_setting: str) -> bool:
    """True if `LORELAY_COMPILE`, or the lack of a compiler, rules a compiled forward pass out."""
    return compile_setting != "graph" or shutil.which(COMPILER) is None
