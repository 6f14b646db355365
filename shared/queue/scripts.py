"""The Lua scripts of `shared/queue/lua/`: their text, and what they have in common."""

import base64
import logging
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources

import redis
from rq.defaults import RQ_KEY_PREFIX

from shared.errors import GenerationFailed, LorelayError, QueueTimeout
from shared.logs import fields
from shared.messages import FinishReason, StreamEvent
from shared.queue.claims import UNREADABLE

logger = logging.getLogger(__name__)

_PARTS = {
    "append": (),
    "mend": (),
    "renew": (),
    "look": ("waiting", "lines"),
    "claim": ("waiting", "lines"),
}
"""Files that stand between the prelude and a script, which takes time at each call; `waiting` for others."""


@cache
def script_source(name: str) -> str:
    """The text of `shared/queue/lua/<name>.lua` behind what it shares with others, on RQ's key prefix."""
    folder = resources.files("shared.queue") / "lua"
    parts = ("prelude", *_PARTS.get(name, ("waiting",)), name)
    source = "".join((folder / f"{part}.lua").read_text() for part in parts)
    for word, value in {
        "@RQ@": RQ_KEY_PREFIX,
        "@UNREADABLE_RESULT@": exception_text(GenerationFailed(UNREADABLE)),
        "@QUEUE_TIMEOUT@": event_format(QueueTimeout()),
        "@QUEUE_TIMEOUT_RESULT@": exception_text(QueueTimeout()),
    }.items():
        source = source.replace(word, value)
    return source


def event_format(error: LorelayError) -> str:
    """The terminal event of an error, with a %d in place of its number."""
    event = StreamEvent(event_no=-1, finish_reason=FinishReason.ERROR, error=error.to_info())
    return event.encode().decode().replace("%", "%%").replace('"event_no":-1', '"event_no":%d')


def exception_text(error: LorelayError) -> str:
    """An error in the form in which RQ's results store exceptions."""
    return base64.b64encode(zlib.compress(f"{error.code}: {error.message}".encode())).decode()


def log_unreadable(entries: Iterable[Sequence[bytes]]) -> None:
    """Logs what a script found unreadable: requests, and keys of a wrong type."""
    for name, reason in entries:
        logger.error(
            "%s can't be read: %s", name.decode(), reason.decode(errors="replace"), extra=fields("unreadable")
        )


def mend(connection: redis.Redis, kinds: Mapping[str, str]) -> None:
    """Renames each of these shared keys that has another type than `kinds` says."""
    script = connection.register_script(script_source("mend"))
    log_unreadable(script(args=[item for key, kind in kinds.items() for item in (kind, key)]))
