"""Settings of OpenMP, PyTorch's thread pool.

Do not import torch here, because torch reads these settings at import.
"""

import os
import shutil
from collections.abc import MutableMapping

COMPILER = "g++"
"""The kernels' compiler. It has PyTorch's OpenMP; threads of a second OpenMP would compete for the cores."""

_CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_SPIN_COUNT = 1000
"""Number of spin iterations, some microseconds in all; a compiled step's threads rarely wait longer."""
_EAGER_SPIN_COUNT = 6000
"""Number of spin iterations of an eager step, which runs Python between its operations. If the threads slept
meanwhile, the step would take a fifth longer, because they would have to be woken for each operation."""


def sleep_while_waiting(*, is_eager: bool = False, environ: MutableMapping[str, str] = os.environ) -> None:
    """Makes waiting threads sleep after a short spin, unless the operator's environment says otherwise.

    This function must be called before torch is imported. With OpenMP's default, waiting threads spin for
    long. If another process takes a core, all other threads then spin in each operation until the thread of
    this core has run, and a step takes ten times as long.
    """
    if not any(choice in environ for choice in _CHOICES):
        environ["OMP_WAIT_POLICY"] = "passive"
        environ["GOMP_SPINCOUNT"] = str(_EAGER_SPIN_COUNT if is_eager else _SPIN_COUNT)


def stays_eager(compile_setting: str) -> bool:
    """True if the forward pass can't be compiled, because of `LORELAY_COMPILE` or for lack of a compiler."""
    return compile_setting != "graph" or shutil.which(COMPILER) is None
