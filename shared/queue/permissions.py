"""The Redis permissions that workers, APIs and `lorelay status` need, and a check for missing permissions.

Redis checks the permission for a command when the command is queued in a transaction, before EXEC. `check`
therefore queues every command with example arguments, and closes the connection without EXEC, so that nothing
is executed.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import redis
from redis.backoff import NoBackoff
from redis.connection import ConnectionInterface
from redis.retry import Retry
from rq.defaults import RQ_KEY_PREFIX as RQ

from shared.errors import ConfigurationError
from shared.queue import keys
from shared.queue.not_now import code_of, is_transient_reply, reply_of

CONTAINERS = ("CLIENT", "SCRIPT")
"""Commands with subcommands, which ACL rules name with two words (`+client|info`)."""
PROBE = "permission-probe"
PROBE_TIMEOUT_S = 5.0
SHA = "0" * 40


class Needs(NamedTuple):
    """The commands that a program calls, with example arguments, and its keys and channels."""

    commands: Sequence[str]
    keys: Sequence[str]
    """One example key of each kind."""
    subscribes: Sequence[str]
    publishes: Sequence[str] = ()

    @property
    def rules(self) -> list[str]:
        """The ACL rules that grant everything the program needs."""
        channels = [*self.publishes, *self.subscribes]
        return [
            *dict.fromkeys(f"~{_pattern(key)}" for key in self.keys),
            *dict.fromkeys(f"&{_pattern(channel)}" for channel in channels),
            *sorted({f"+{_name(command.split())}" for command in [*self.commands, *_around(self)]}),
        ]


_KEY = keys.MODELS
_SCRIPTS_OF_BOTH = (
    "TIME",
    f"DEL {_KEY}",
    f"EXISTS {_KEY}",
    f"EXPIRE {_KEY} 1",
    f"GET {_KEY}",
    f"HGET {_KEY} f",
    f"HMGET {_KEY} f",
    f"HSET {_KEY} f v",
    f"LINDEX {_KEY} 0",
    f"LLEN {_KEY}",
    f"LPUSH {_KEY} v",
    f"LREM {_KEY} 0 v",
    f"LTRIM {_KEY} 0 63",
    f"RENAME {_KEY} {_KEY}",
    f"RPUSH {_KEY} v",
    f"SADD {_KEY} m",
    f"SCARD {_KEY}",
    f"SET {_KEY} v",
    f"SREM {_KEY} m",
    f"TYPE {_KEY}",
    f"XADD {_KEY} * f v",
    f"ZADD {_KEY} 1 m",
    f"ZRANGE {_KEY} 0 -1",
    f"ZREM {_KEY} m",
    # Used by the registry of models.
    f"HGETALL {_KEY}",
    f"EVALSHA {SHA} 0",
    "SCRIPT LOAD x",
)
_KEYS_OF_BOTH = (
    _KEY,
    keys.LOADING,
    keys.waiting(PROBE),
    keys.order(PROBE),
    keys.doorbell(PROBE),
    keys.owner(PROBE),
    keys.reader(PROBE),
    keys.log(PROBE),
    keys.workers(PROBE),
    keys.drained(PROBE, 0),
    keys.backlog(PROBE),
    keys.events_channel(PROBE),
    f"{RQ}:job:{PROBE}",
    f"{RQ}:queue:{PROBE}",
    f"{RQ}:queues",
    f"{RQ}:canceled:{PROBE}",
    f"{RQ}:workers:{PROBE}",
)
_KEYS_OF_ENDS = (
    keys.leases(PROBE),
    f"{RQ}:execution:{PROBE}",
    f"{RQ}:executions:{PROBE}",
    f"{RQ}:failed:{PROBE}",
    f"{RQ}:finished:{PROBE}",
    f"{RQ}:results:{PROBE}",
    f"{RQ}:wip:{PROBE}",
    f"{RQ}:worker:{PROBE}",
)
"""The keys that a script changes when it ends a job."""
WORKER = Needs(
    commands=(
        *_SCRIPTS_OF_BOTH,
        # Used by scripts.
        f"HDEL {_KEY} f",
        f"LRANGE {_KEY} 0 -1",
        f"PERSIST {_KEY}",
        f"PEXPIRE {_KEY} 1",
        f"PTTL {_KEY}",
        f"SMEMBERS {_KEY}",
        f"ZCARD {_KEY}",
        f"ZRANGEBYSCORE {_KEY} 0 1",
        f"ZREMRANGEBYSCORE {_KEY} 0 1",
        f"ZSCORE {_KEY} m",
        # Used by the worker's Python code and by RQ.
        "INFO",
        f"BLPOP {_KEY} 0",
        f"HEXISTS {_KEY} f",
        f"HSETNX {_KEY} f v",
        "CLIENT INFO",
        f"CLIENT SETNAME {PROBE}",
    ),
    keys=(
        *_KEYS_OF_BOTH,
        keys.reaped(PROBE),
        *_KEYS_OF_ENDS,
        f"{RQ}:suspended",
        f"{RQ}:workers",
    ),
    publishes=(keys.events_channel(PROBE),),
    subscribes=(f"{RQ}:pubsub:{PROBE}",),
)
API = Needs(
    commands=(
        *_SCRIPTS_OF_BOTH,
        f"HDEL {_KEY} f",
        f"LRANGE {_KEY} 0 -1",
        f"PERSIST {_KEY}",
        "PING",
        f"SMEMBERS {_KEY}",
        f"ZCARD {_KEY}",
        f"ZRANGEBYSCORE {_KEY} 0 1",
    ),
    keys=(*_KEYS_OF_BOTH, keys.OVERDUE_CHECK, *_KEYS_OF_ENDS),
    publishes=(keys.events_channel(PROBE),),
    subscribes=(keys.events_channel(PROBE),),
)


def check(connection: redis.Redis, needs: Needs) -> None:
    """Raises an error if the connection's Redis user lacks a permission.

    Raises:
        ConfigurationError: permissions are missing; the message has the ACL rules that grant them.
        redis.RedisError: the server does not answer, or refuses for another reason.
    """
    pool = connection.connection_pool
    if rules := missing_rules(pool, needs):
        raise ConfigurationError(describe(rules, pool.connection_kwargs.get("username")))


def describe(rules: Iterable[str], username: str | None) -> str:
    """Returns the message for an operator whose Redis user lacks these rules."""
    return f"Redis: a permission is missing: ACL SETUSER {username or 'default'} {' '.join(rules)}"


def missing_rules(pool: redis.ConnectionPool, needs: Needs) -> list[str]:
    """Returns the ACL rules that the pool's user lacks, in the syntax of `ACL SETUSER`.

    Raises:
        redis.RedisError: the server does not answer, or refuses for another reason.
    """
    with _connection(pool) as connection:
        lacking = _ask(connection, ["MULTI"])
        # If MULTI is refused, the commands below are not sent, because they would be executed.
        if not lacking:
            lacking = _queue(connection, needs)
    for channel in needs.subscribes:
        # Subscriptions are checked outside a transaction, because Redis 7 refuses them inside one.
        with _connection(pool) as connection:
            lacking += _ask(connection, ["SUBSCRIBE", channel], ["UNSUBSCRIBE", channel])
    if "+multi" not in lacking:
        with _connection(pool) as connection:
            lacking += _ask(connection, ["MULTI"], ["EXEC"])
    return list(dict.fromkeys(lacking))


def _around(needs: Needs) -> list[str]:
    """Returns the names of the commands that `missing_rules` sends outside of the transaction."""
    return ["MULTI", "EXEC", "SUBSCRIBE", "UNSUBSCRIBE", *["PUBLISH"] * bool(needs.publishes)]


def _queue(connection: ConnectionInterface, needs: Needs) -> list[str]:
    """Queues the commands that a transaction can contain, without EXEC; returns the missing rules."""
    queued = [command.split() for command in needs.commands]
    queued += [[name, key] for key in needs.keys for name in ("EXISTS", "DEL")]
    queued += [["PUBLISH", channel, "x"] for channel in needs.publishes]
    return _ask(connection, *queued)


def _ask(connection: ConnectionInterface, *commands: Sequence[str]) -> list[str]:
    """Sends all commands, then reads their replies; returns the missing rules."""
    for words in commands:
        connection.send_command(*words)  # type: ignore[no-untyped-call]
    rules = [_missing_rule(connection, words) for words in commands]
    return [rule for rule in rules if rule is not None]


def _missing_rule(connection: ConnectionInterface, words: Sequence[str]) -> str | None:
    """Reads the reply to a command; returns the rule that the user lacks for the command, or None."""
    try:
        # In RESP3, the reply to SUBSCRIBE is a push message.
        connection.read_response(push_request=True)
    except redis.ResponseError as error:
        # Servers check permissions first: a user who gets a transient error has the permission.
        if is_transient_reply(error):
            return None
        if code_of(error) != "NOPERM":
            raise
        refusal = reply_of(error)
        if "to run the" in refusal:
            return f"+{_name(words)}"
        return f"{'&' if 'channel' in refusal else '~'}{_pattern(words[1])}"
    return None


def _name(words: Sequence[str]) -> str:
    """Returns the name of a command in ACL rules."""
    return "|".join(words[: 1 + (words[0] in CONTAINERS)]).lower()


def _pattern(name: str) -> str:
    """Returns the ACL pattern for all names that have the same prefix as `name` (`lorelay:` or `rq:`)."""
    return f"{name.partition(':')[0]}:*"


@contextmanager
def _connection(pool: redis.ConnectionPool) -> Iterator[ConnectionInterface]:
    """Opens a connection outside the pool, with its own timeout and without retries.

    The connection is always closed at the end, so that the server discards the transaction.
    """
    options = pool.connection_kwargs | {
        "retry": Retry(NoBackoff(), 0),
        "socket_timeout": PROBE_TIMEOUT_S,
    }
    own = redis.ConnectionPool(connection_class=pool.connection_class, **options)
    connection = own.make_connection()
    try:
        connection.connect()  # type: ignore[no-untyped-call]
        yield connection
    finally:
        connection.disconnect()  # type: ignore[no-untyped-call]
