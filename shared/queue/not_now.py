"""Replies of Redis and Valkey that mean "not now": workers wait, APIs answer 503.

redis-py strips the code of a reply whose class it knows, and puts words before that of a pipeline; Redis 6.2
wraps errors inside a script. `reply_of` undoes all of it, and `NOT_NOW` is matched against the result.
"""

import re
from types import MappingProxyType

import redis

NOT_NOW = MappingProxyType(
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
"""Code, or code and first words, of each such reply, with the reason why it passes.

`tests/unit/shared/queue/test_not_now.py` holds the ones that are left out on purpose.
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
"""By redis-py's class: the code that it has stripped."""
_IN_PIPELINE = re.compile(r"Command # \d+ \(.*\) of pipeline ?caused error: (?:\(['\"])?", re.DOTALL)
_IN_SCRIPT = re.compile(
    r"(?:ERR )?Error running script \(call to \w+\): @user_script:\d+: (?:@user_script: \d+: )?-?"
)
_DISCARDED = "Transaction discarded because of: "
_CODE = re.compile(r"(?!ACL )[A-Z][A-Z0-9]*(?=\s|$)")
"""`ERR ACL failure in script` begins like a code once redis-py has stripped the `ERR`."""


def reply_of(error: redis.RedisError) -> str:
    """The reply behind an exception, as the server says it where no pipeline and no script is around it.

    It begins with its code, `ERR` where it has no other. An exception of redis-py's own (a lost connection)
    gives `ERR` and its text.
    """
    text = str(error.args[0]) if error.args else ""
    text = _IN_PIPELINE.sub("", text, count=1)
    code = next((_CODES[cls.__name__] for cls in type(error).__mro__ if cls.__name__ in _CODES), ERR)
    if code == "EXECABORT" and text.startswith(_DISCARDED):
        return _with_code(text.removeprefix(_DISCARDED), ERR)
    return _with_code(_IN_SCRIPT.sub("", text, count=1), code)


def code_of(error: redis.RedisError) -> str:
    """The first word of `reply_of`."""
    return reply_of(error).partition(" ")[0]


def is_not_now(error: redis.RedisError) -> bool:
    """Whether the server said that it serves again later."""
    reply = f"{reply_of(error)} "
    return any(reply.startswith(f"{said} ") for said in NOT_NOW)


def _with_code(text: str, code: str) -> str:
    return text if code == ERR and _CODE.match(text) else f"{code} {text}"
