"""Limits the sizes of oneDNN's caches. Do not import torch here: it reads the limits when it is loaded."""

import os
from collections.abc import MutableMapping

_CAPACITIES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""Environment variables for the capacities of oneDNN's cache, and of PyTorch's cache in front of oneDNN's."""
_NUM_ENTRIES = 128
"""Number of entries, enough for all matmuls of decode steps with up to 25 rows. A matmul without an entry
takes a quarter of a millisecond longer."""


def bound_caches(environ: MutableMapping[str, str] = os.environ) -> None:
    """Limits oneDNN's caches, unless the operator's environment sets limits. Call it before torch is loaded.

    Both caches have an entry for each shape of a matmul, and prompts keep bringing new numbers of rows. With
    the default limit of 1,024 entries, a worker grows by several hundred MiB.
    """
    for name in _CAPACITIES:
        environ.setdefault(name, str(_NUM_ENTRIES))
