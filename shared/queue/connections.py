"""Opens connections to Redis, with the same options in every process."""

from collections.abc import Iterable
from urllib.parse import urlsplit

import redis
import redis.asyncio
import redis.asyncio.retry
from redis.asyncio.connection import AbstractConnection
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.retry import Retry

from shared.errors import ConfigurationError
from shared.queue.not_now import is_transient_reply
from shared.queue.refusals import NamingRedis
from shared.settings import RedisSettings

MIN_VERSION = (6, 2)
SOCKET_TIMEOUT_S = 5.0
"""Maximum wait for a reply of Redis when no HTTP client is waiting."""


class _ClosedMeansLost(AbstractConnection):
    """A connection that turns the error for a closed socket into redis-py's `ConnectionError`.

    For a write to a closed socket, uvloop raises a RuntimeError, after which redis-py would not reconnect.
    """

    async def send_packed_command(
        self, command: bytes | str | Iterable[bytes], check_health: bool = True
    ) -> None:
        try:
            await super().send_packed_command(command, check_health)
        except RuntimeError as error:
            raise redis.ConnectionError(str(error)) from error


class _TcpConnection(_ClosedMeansLost, redis.asyncio.Connection):
    pass


class _TlsConnection(_ClosedMeansLost, redis.asyncio.SSLConnection):
    pass


class _UnixConnection(_ClosedMeansLost, redis.asyncio.UnixDomainSocketConnection):
    pass


_CONNECTION_CLASSES = {"redis": _TcpConnection, "rediss": _TlsConnection, "unix": _UnixConnection}


def connect(settings: RedisSettings, *, socket_timeout_s: float | None = None) -> redis.Redis:
    """Returns a blocking client of Redis, which connects at its first command."""
    return redis.Redis.from_url(settings.redis_url, socket_timeout=socket_timeout_s)


def connect_async(
    settings: RedisSettings,
    *,
    socket_timeout_s: float | None = None,
    max_num_retries: int = 1,
    max_num_connections: int = 32,
) -> redis.asyncio.Redis:
    """Returns an asyncio client of Redis with few retries, because HTTP requests wait for the replies.

    The Redis client opens at most `max_num_connections` connections. If all connections are in use, a command
    waits up to `socket_timeout_s` for a free one.
    """
    pool = redis.asyncio.BlockingConnectionPool.from_url(
        settings.redis_url,
        connection_class=_CONNECTION_CLASSES[urlsplit(settings.redis_url).scheme],
        max_connections=max_num_connections,
        timeout=socket_timeout_s,
        socket_timeout=socket_timeout_s,
        socket_connect_timeout=socket_timeout_s,
        retry=redis.asyncio.retry.Retry(ExponentialBackoff(cap=0.1, base=0.02), max_num_retries),
        health_check_interval=0,
    )
    return redis.asyncio.Redis.from_pool(pool)


def check_server(connection: redis.Redis) -> None:
    """Raises an error if the server is too old for the commands in the scripts.

    Raises:
        ConfigurationError: the server is older than 6.2.
        redis.ConnectionError: the server can't be reached.
    """
    version = str(connection.info("server")["redis_version"])
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_VERSION:
        raise ConfigurationError(f"Redis {version} is too old: Lorelay needs Redis 6.2 or later, or Valkey")


def retry_briefly(connection: redis.Redis) -> None:
    """Makes a client retry its commands for about 2 s after a lost connection.

    RQ's code needs such a client, because it does not handle lost connections.
    """
    connection.set_retry(Retry(ExponentialBackoff(cap=0.5, base=0.05), 7))


def connect_like(connection: redis.Redis, *, socket_timeout_s: float) -> redis.Redis:
    """Returns a new client for the server of `connection`, without retries after a lost connection."""
    pool = connection.connection_pool
    options = pool.connection_kwargs | {"socket_timeout": socket_timeout_s, "retry": Retry(NoBackoff(), 0)}
    return NamingRedis(
        connection_pool=redis.ConnectionPool(connection_class=pool.connection_class, **options)
    )


def is_transient(error: redis.RedisError) -> bool:
    """True if the error is due to the server's present state, so that a retry may succeed."""
    is_lost = isinstance(error, redis.ConnectionError | redis.TimeoutError)
    return is_transient_reply(error) or (is_lost and not isinstance(error, redis.AuthenticationError))


def is_wrong_type(error: object) -> bool:
    """True if Redis refused a command because its key has a wrong type."""
    return isinstance(error, redis.ResponseError) and str(error).startswith("WRONGTYPE")


def same_server(url: str, connection: redis.Redis) -> bool:
    """True if a URL names the same server and database that a client uses."""

    def address(options: dict[str, object]) -> tuple[object, ...]:
        return (
            options.get("path") or (options.get("host", "localhost"), options.get("port", 6379)),
            options.get("db") or 0,
        )

    named = redis.connection.parse_url(url)  # type: ignore[no-untyped-call]
    return address(dict(named)) == address(connection.connection_pool.connection_kwargs)
