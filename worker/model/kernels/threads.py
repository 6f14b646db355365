"""How the threads of the forward pass wait for each other; without torch, which reads it when it loads."""

import os
import shutil
from collections.abc import MutableMapping

COMPILER = "g++"
"""Its OpenMP is that of PyTorch: another one's threads would fight with PyTorch's for the cores."""

_CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_SPIN_COUNT = 1000
"""Some microseconds: most waits in a compiled step are over by then, and a busy neighbour costs no more."""
_EAGER_SPIN_COUNT = 6000
"""Of a step whose operations have Python between them: to wake a thread for each costs a fifth of it."""


def sleep_while_waiting(*, is_eager: bool = False, environ: MutableMapping[str, str] = os.environ) -> None:
    """Makes threads that wait for each other sleep soon, unless an operator chose. Call before torch loads.

    By default they spin. Where another process takes one of their cores, the rest then burn theirs until it
    comes back, once per operation: a step takes ten times as long.
    """
    if not any(choice in environ for choice in _CHOICES):
        environ["OMP_WAIT_POLICY"] = "passive"
        environ["GOMP_SPINCOUNT"] = str(_EAGER_SPIN_COUNT if is_eager else _SPIN_COUNT)


def stays_eager(compile_setting: str) -> bool:
    """Whether no compiled forward pass is to be expected with this `LORELAY_COMPILE`."""
    return compile_setting != "graph" or shutil.which(COMPILER) is None
