"""Sizes of oneDNN's caches. They are read when torch loads, so this module does not import it."""

import os
from collections.abc import MutableMapping

_CAPACITIES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""Variables for oneDNN's own cache, and for the one that PyTorch keeps in front of it."""
_NUM_PRODUCTS = 128
"""Entries for all products of decode steps with up to 25 rows. A missing entry costs a quarter of a
millisecond."""


def bound_caches(environ: MutableMapping[str, str] = os.environ) -> None:
    """Bounds oneDNN's caches, unless the operator's environment does. Call it before torch loads.

    Both caches have an entry per shape of product, and prompts have ever new numbers of rows. At the default
    of 1,024 entries a worker grows by several hundred MiB.
    """
    for name in _CAPACITIES:
        environ.setdefault(name, str(_NUM_PRODUCTS))
