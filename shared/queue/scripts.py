"""The Lua scripts of `shared/queue/lua/`: their text, and what they have in common."""

import base64
import logging
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources

import redis
from rq.defaults import RQ_KEY_PREFIX

from shared.errors import GenerationFailed, LorelayError
from shared.logs import fields
from shared.queue.claims import UNREADABLE

logger = logging.getLogger(__name__)


@cache
def script_source(name: str) -> str:
    """The text of `shared/queue/lua/<name>.lua` behind the prelude, with RQ's key prefix filled in."""
    folder = resources.files("shared.queue") / "lua"
    prelude = (folder / "prelude.lua").read_text().replace("@RQ@", RQ_KEY_PREFIX)
    prelude = prelude.replace("@UNREADABLE_RESULT@", exception_text(GenerationFailed(UNREADABLE)))
    return prelude + (folder / f"{name}.lua").read_text()


def exception_text(error: LorelayError) -> str:
    """An error in the form in which RQ's results store exceptions."""
    return base64.b64encode(zlib.compress(f"{error.code}: {error.message}".encode())).decode()


def log_unreadable(entries: Iterable[Sequence[bytes]]) -> None:
    """Logs what a script found unreadable: requests, and keys of a wrong type."""
    for name, reason in entries:
        logger.error(
            "%s set aside: %s", name.decode(), reason.decode(errors="replace"), extra=fields("unreadable")
        )


def mend(connection: redis.Redis, kinds: Mapping[str, str]) -> None:
    """Renames each of these shared keys that has another type than `kinds` says."""
    script = connection.register_script(script_source("mend"))
    log_unreadable(script(args=[item for key, kind in kinds.items() for item in (kind, key)]))
