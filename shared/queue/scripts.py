"""Loads the Lua scripts of `shared/queue/lua/`, and builds arguments and texts that several of them use."""

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
    "swap_card": (),
    "renew": (),
    "look": ("waiting", "lines"),
    "claim": ("waiting", "lines"),
}
"""Files to load between `prelude.lua` and a script; scripts not named here get `waiting.lua`.

Redis runs these files, too, at each call of the script, so scripts load only what they need.
"""


@cache
def script_source(name: str) -> str:
    """Returns a script's text, after the text of the files that it needs; all `@WORDS@` are filled in."""
    folder = resources.files("shared.queue") / "lua"
    parts = ("prelude", *_PARTS.get(name, ("waiting",)), name)
    source = "".join((folder / f"{part}.lua").read_text("utf-8") for part in parts)
    for word, value in {
        "@RQ@": RQ_KEY_PREFIX,
        "@UNREADABLE_RESULT@": exception_text(GenerationFailed(UNREADABLE)),
        "@QUEUE_TIMEOUT@": event_format(QueueTimeout()),
        "@QUEUE_TIMEOUT_RESULT@": exception_text(QueueTimeout()),
    }.items():
        source = source.replace(word, value)
    return source


def event_format(error: LorelayError) -> str:
    """Returns the encoded terminal event of an error, with `%d` in place of its `event_no`."""
    event = StreamEvent(event_no=-1, finish_reason=FinishReason.ERROR, error=error.to_info())
    return event.encode().decode().replace("%", "%%").replace('"event_no":-1', '"event_no":%d')


def exception_text(error: LorelayError) -> str:
    """Returns an error as text, in the format of exceptions in RQ's results."""
    return base64.b64encode(zlib.compress(f"{error.code}: {error.message}".encode())).decode()


def log_unreadable(entries: Iterable[Sequence[bytes]]) -> None:
    """Logs (name, reason) pairs that a script returned: unreadable requests, and keys of a wrong type."""
    for name, reason in entries:
        logger.error(
            "%s can't be read: %s", name.decode(), reason.decode(errors="replace"), extra=fields("unreadable")
        )


def mend(connection: redis.Redis, kinds: Mapping[str, str]) -> None:
    """Renames each key that has another type in Redis than in `kinds`."""
    script = connection.register_script(script_source("mend"))
    log_unreadable(script(args=[item for key, kind in kinds.items() for item in (kind, key)]))
