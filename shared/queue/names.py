"""Queue names: one RQ queue per base model and one per adapter."""

import hashlib
import re
from functools import lru_cache

_PLAIN = re.compile(r"[a-z0-9_-]+")
_HASH_DIGITS = 6


@lru_cache(maxsize=4096)
def slug(name: str) -> str:
    """Returns a form of a model's name that is safe in Redis keys, in RQ's lists and in the dashboard's URLs.

    A name that has only characters of `[a-z0-9_-]` stays unchanged. Any other name is lower-cased, its other
    characters are replaced by `-`, and six hex digits of the name's SHA-256 are appended to keep it unique.
    """
    if _PLAIN.fullmatch(name):
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:_HASH_DIGITS]
    return f"{re.sub(r'[^a-z0-9_-]+', '-', name.lower()).strip('-')}-{digest}"


def queue_name(base: str, adapter_name: str | None) -> str:
    """Returns the name of the queue of an adapter, or of the base model if `adapter_name` is None."""
    return slug(base) if adapter_name is None else f"{slug(base)}-{slug(adapter_name)}"
