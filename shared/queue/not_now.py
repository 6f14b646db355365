"""Replies of Redis and Valkey that mean "not now": workers wait, APIs answer 503.

redis-py removes the error code of a reply if it has an exception class for it, and puts a prefix before
errors in a pipeline; Redis 6.2 wraps errors inside a script. `reply_of` restores the reply, which is then
looked up in `TRANSIENT_REPLIES`.
"""

import re
from types import MappingProxyType

import redis

TRANSIENT_REPLIES = MappingProxyType(
    {
        "BUSY": "a script or a module command of another client runs; it ends, or is killed",
        "CLUSTERDOWN": "a proxy before the server finds no node that serves the key at the moment",
        "ERR Script killed by user": "an operator's SCRIPT KILL met a script of ours before it wrote",
        "ERR max number of clients": "other clients take all connections; some of them close",
        "LOADING": "the server reads its data after a start",
        "MASTERDOWN": "the server is a replica without its master, and is told not to serve old data",
        "MISCONF": "the server can't write to its disk; writes are allowed again when it can",
        "NOREPLICAS": "fewer replicas follow than min-replicas-to-write asks for; they come back",
        "NOSCRIPT": "a failover between loading a script and calling it; the next call loads it",
        "OOM": "the server has reached maxmemory; requests that end, or an operator, make room",
        "READONLY": "the server was made a replica; a failover ends with one that takes writes",
        "TRYAGAIN": "a proxy before the server moves the key to another node at the moment",
        "UNBLOCKED": "the server became a replica, or an operator ended a wait with CLIENT UNBLOCK",
    }
)
"""Error code, or code and first words, of each such reply, with the reason why it passes by itself.

`tests/unit/shared/queue/test_not_now.py` lists the replies that are left out on purpose.
"""

ERR = "ERR"
_CODES = {
    "AskError": "ASK",
    "AuthenticationError": "WRONGPASS",
    "BusyLoadingError": "LOADING",
    "ClusterCrossSlotError": "CROSSSLOT",
    "ClusterDownError": "CLUSTERDOWN",
    "ExecAbortError": "EXECABORT",
    "MasterDownError": "MASTERDOWN",
    "MovedError": "MOVED",
    "NoPermissionError": "NOPERM",
    "NoScriptError": "NOSCRIPT",
    "OutOfMemoryError": "OOM",
    "ReadOnlyError": "READONLY",
    "TryAgainError": "TRYAGAIN",
}
"""The error code that redis-py removed, by the class of its exception."""
_IN_PIPELINE = re.compile(r"Command # \d+ \(.*\) of pipeline ?caused error: (?:\(['\"])?", re.DOTALL)
_IN_SCRIPT = re.compile(
    r"(?:ERR )?Error running script \(call to \w+\): @user_script:\d+: (?:@user_script: \d+: )?-?"
)
_DISCARDED = "Transaction discarded because of: "
_CODE = re.compile(r"(?!ACL )[A-Z][A-Z0-9]*(?=\s|$)")
"""Matches an error code. `ACL failure in script`, without its `ERR`, would look like one."""


def reply_of(error: redis.RedisError) -> str:
    """The server's reply behind an exception, without what pipelines and scripts add to it.

    It begins with its error code, or with `ERR` if it has none. An exception of redis-py itself (a lost
    connection) gives `ERR` and its text.
    """
    text = str(error.args[0]) if error.args else ""
    text = _IN_PIPELINE.sub("", text, count=1)
    code = next((_CODES[cls.__name__] for cls in type(error).__mro__ if cls.__name__ in _CODES), ERR)
    if code == "EXECABORT" and text.startswith(_DISCARDED):
        return _with_code(text.removeprefix(_DISCARDED), ERR)
    return _with_code(_IN_SCRIPT.sub("", text, count=1), code)


def code_of(error: redis.RedisError) -> str:
    """The error code: the first word of `reply_of`."""
    return reply_of(error).partition(" ")[0]


def is_transient_reply(error: redis.RedisError) -> bool:
    """True if the server refused only for now."""
    reply = f"{reply_of(error)} "
    return any(reply.startswith(f"{said} ") for said in TRANSIENT_REPLIES)


def _with_code(text: str, code: str) -> str:
    return text if code == ERR and _CODE.match(text) else f"{code} {text}"
