"""Limits the sizes of oneDNN's caches. Do not import torch here, because torch reads the limits at import."""

import os
from collections.abc import MutableMapping

_CAPACITIES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""Environment variables for the capacities of oneDNN's cache, and of PyTorch's cache in front of oneDNN's."""
_NUM_ENTRIES = 128
"""Number of entries, enough for all matmuls of decode steps with up to 25 rows. A matmul without an entry
takes a quarter of a millisecond longer."""


def bound_caches(environ: MutableMapping[str, str] = os.environ) -> None:
    """Limits oneDNN's caches, unless the environment sets limits; must be called before torch is imported.

    The caches have an entry for each shape of a matmul, and prompts of new lengths bring new shapes. With the
    default limit of 1,024 entries, the memory of a worker would grow by several hundred MiB.
    """
    for name in _CAPACITIES:
        environ.setdefault(name, str(_NUM_ENTRIES))
