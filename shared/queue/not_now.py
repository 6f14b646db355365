"""Transient error replies of Redis and Valkey, after which workers retry and APIs answer 503.

A reply is recognized by its first word, the error code. An exception's text does not always begin with this
code: redis-py removes some codes, and puts text before an error in a pipeline. Redis 6.2 puts text before an
error in a script. `reply_of` restores the original reply.
"""

import re
from types import MappingProxyType

import redis

TRANSIENT_REPLIES = MappingProxyType(
    {
        "BUSY": "a script or a module command of another client is running; it will end or be killed",
        "CLUSTERDOWN": "a proxy in front of the server finds no node that serves the key at the moment",
        "ERR Script killed by user": "an operator's SCRIPT KILL ended one of our scripts before it wrote",
        "ERR max number of clients": "all connections are in use; some of them will close",
        "LOADING": "the server has started and is reading its data",
        "MASTERDOWN": "the server is a replica without its master, configured not to serve old data",
        "MISCONF": "the server can't write to its disk, and refuses writes until it can",
        "NOREPLICAS": "fewer replicas are connected than min-replicas-to-write demands",
        "NOSCRIPT": "a failover came between loading a script and calling it; the next call loads it",
        "OOM": "the server has reached maxmemory; requests that end, or an operator, free memory",
        "READONLY": "the server was made a replica; after the failover a server accepts writes",
        "TRYAGAIN": "a proxy in front of the server is moving the key to another node",
        "UNBLOCKED": "the server became a replica, or an operator ended a wait with CLIENT UNBLOCK",
    }
)
"""Error code, or code and first words, of each transient reply → the cause, and the reason why it passes.

`tests/unit/shared/queue/test_not_now.py` lists the replies that are deliberately left out here.
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
"""Name of redis-py's exception class → the error code that redis-py removed from the reply."""
_IN_PIPELINE = re.compile(r"Command # \d+ \(.*\) of pipeline ?caused error: (?:\(['\"])?", re.DOTALL)
_IN_SCRIPT = re.compile(
    r"(?:ERR )?Error running script \(call to \w+\): @user_script:\d+: (?:@user_script: \d+: )?-?"
)
_DISCARDED = "Transaction discarded because of: "
_CODE = re.compile(r"(?!ACL )[A-Z][A-Z0-9]*(?=\s|$)")
"""Matches an error code. `ACL failure in script` is excluded: its code was `ERR`, which redis-py removed."""


def reply_of(error: redis.RedisError) -> str:
    """Returns the server's reply behind an exception, without the text that pipelines and scripts add.

    The result begins with an error code, which is `ERR` if the reply has none. For an exception that redis-py
    itself raised (a lost connection), the result is `ERR` and the text of the exception.
    """
    text = str(error.args[0]) if error.args else ""
    text = _IN_PIPELINE.sub("", text, count=1)
    code = next((_CODES[cls.__name__] for cls in type(error).__mro__ if cls.__name__ in _CODES), ERR)
    if code == "EXECABORT" and text.startswith(_DISCARDED):
        return _with_code(text.removeprefix(_DISCARDED), ERR)
    return _with_code(_IN_SCRIPT.sub("", text, count=1), code)


def code_of(error: redis.RedisError) -> str:
    """Returns the error code of the reply behind an exception: the first word of `reply_of`."""
    return reply_of(error).partition(" ")[0]


def is_transient_reply(error: redis.RedisError) -> bool:
    """True if the reply is a transient error, so that the same command may succeed later."""
    reply = f"{reply_of(error)} "
    return any(reply.startswith(f"{said} ") for said in TRANSIENT_REPLIES)


def _with_code(text: str, code: str) -> str:
    return text if code == ERR and _CODE.match(text) else f"{code} {text}"
