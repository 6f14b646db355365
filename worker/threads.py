"""How the threads of the forward pass wait for each other; without torch, which reads it when it loads."""

import os
from collections.abc import MutableMapping

_CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_SPIN_COUNT = 1000
"""Some microseconds: most waits within a step are over by then, and a busy neighbour costs no more."""


def sleep_while_waiting(environ: MutableMapping[str, str] = os.environ) -> None:
    """Makes threads that wait for each other sleep soon, unless an operator chose. Call before torch loads.

    By default they spin. Where another process takes one of their cores, the rest then burn theirs until it
    comes back, once per operation: a step takes ten times as long.
    """
    if not any(choice in environ for choice in _CHOICES):
        environ["OMP_WAIT_POLICY"] = "passive"
        environ["GOMP_SPINCOUNT"] = str(_SPIN_COUNT)
