"""How many products oneDNN keeps prepared; without torch, which reads it when it loads."""

import os
from collections.abc import MutableMapping

_CAPACITIES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""Of oneDNN's own cache, and of the one that PyTorch has in front of it."""
_NUM_PRODUCTS = 128
"""All those of decode steps with up to 25 rows; another one takes a quarter of a millisecond to prepare."""


def bound_caches(environ: MutableMapping[str, str] = os.environ) -> None:
    """Bounds the memory of oneDNN's caches, unless an operator chose. Call before torch loads.

    Both keep each product by its shape, and prompts bring ever new numbers of rows: with the 1,024 products
    of the default a worker grows by several hundred MiB.
    """
    for name in _CAPACITIES:
        environ.setdefault(name, str(_NUM_PRODUCTS))
