"""Explains an error of Redis that no retry can cure, in a log line with command, error and remedy."""

import hashlib
import re
from functools import cache
from importlib import resources
from typing import Any

import redis

from shared.queue.not_now import code_of, is_transient_reply, reply_of
from shared.queue.scripts import script_source

_PERMISSION = "give its user that permission: docs/operations.md has the ACL rule that suffices"
_PASSWORD = "check the user and the password in its URL"
_CLUSTER = "Lorelay needs one server, not a cluster"
_ADVICE = {
    "ASK": _CLUSTER,
    "CROSSSLOT": _CLUSTER,
    "DENIED": "give the server a password, or turn its protected mode off",
    "MOVED": _CLUSTER,
    "NOAUTH": _PASSWORD,
    "NOPERM": _PERMISSION,
    "WRONGPASS": _PASSWORD,
    "WRONGTYPE": "a key of Lorelay has another type: give Lorelay a Redis database of its own",
}
_OTHER_ADVICE = "a retry will not help: see the log of the server"
_IN_SCRIPT = ("ERR ACL failure in script", "ERR The user executing the script")
_IN_PIPELINE = re.compile(r"Command # \d+ \((\S+)")


class NamingRedis(redis.Redis):
    """A Redis client whose exceptions have a note with the name of the failed command or script."""

    def execute_command(self, *args: Any, **options: Any) -> Any:
        try:
            return super().execute_command(*args, **options)  # type: ignore[no-untyped-call]
        except redis.RedisError as error:
            error.add_note(_name(args))
            raise


def explain(error: redis.RedisError) -> str:
    """Returns one line that names the failed command, the error and the remedy."""
    if isinstance(error, redis.ConnectionError | redis.TimeoutError) and code_of(error) == "ERR":
        return f"can't reach Redis: {error}"
    reply = reply_of(error)
    if is_transient_reply(error):
        return f"Redis is not available now, try again later: {reply}"
    advice = _PERMISSION if reply.startswith(_IN_SCRIPT) else _ADVICE.get(code_of(error), _OTHER_ADVICE)
    return f"Redis refused {_what_failed(error)}: {' '.join(reply.split())} ({advice})"


def _what_failed(error: redis.RedisError) -> str:
    if in_pipeline := _IN_PIPELINE.match(str(error)):
        return in_pipeline[1]
    return next(iter(getattr(error, "__notes__", [])), "a command")


def _name(args: tuple[Any, ...]) -> str:
    """Returns the name of a command, or of the script if the command runs one of Lorelay's scripts."""
    if args[0] == "EVALSHA":
        return f"the script {_script_names().get(str(args[1]), args[1])}"
    return str(args[0])


@cache
def _script_names() -> dict[str, str]:
    """Returns the names of Lorelay's scripts by the SHA-1 that `EVALSHA` sends."""
    files = (resources.files("shared.queue") / "lua").iterdir()
    names = [file.name.removesuffix(".lua") for file in files if file.name.endswith(".lua")]
    return {hashlib.sha1(script_source(name).encode()).hexdigest(): name for name in names}
