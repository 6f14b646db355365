"""States of a real server in which it answers "not now", each for the time of a context."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

import redis

from tests.redis_server import free_port
from tests.waiting import wait_until

BUSY_OPTIONS = ("--lua-time-limit", "5")
"""Server options with which a long script soon makes the server say BUSY."""
LOOP = "while true do redis.call('EXISTS', 'nothing') end"


@contextmanager
def busy(connection: redis.Redis) -> Iterator[None]:
    """BUSY: another client's script runs all the time. Needs a server with `BUSY_OPTIONS`."""

    def loop() -> None:
        with redis.Redis(connection_pool=connection.connection_pool) as other, suppress(redis.RedisError):
            other.eval(LOOP, 0)

    thread = threading.Thread(target=loop, name="busy")
    thread.start()
    try:
        wait_until(lambda: _reply(connection.ping).startswith("BUSY"), what="BUSY")
        yield
    finally:
        connection.execute_command("SCRIPT", "KILL")
        thread.join()


@contextmanager
def without_replicas(connection: redis.Redis) -> Iterator[None]:
    """NOREPLICAS: the server accepts writes only while a replica follows it, and none does."""
    with configured(connection, "min-replicas-to-write", 1):
        yield


@contextmanager
def demoted(connection: redis.Redis) -> Iterator[None]:
    """READONLY: the server becomes a replica of one that can't be reached, so that it keeps its data."""
    connection.execute_command("REPLICAOF", "127.0.0.1", free_port())
    try:
        yield
    finally:
        connection.execute_command("REPLICAOF", "NO", "ONE")


@contextmanager
def orphaned(connection: redis.Redis) -> Iterator[None]:
    """MASTERDOWN: the server becomes such a replica, and is told not to serve old data."""
    with configured(connection, "replica-serve-stale-data", "no"), demoted(connection):
        yield


@contextmanager
def full(connection: redis.Redis) -> Iterator[None]:
    """OOM: the server's memory limit is below what it has."""
    with configured(connection, "maxmemory", 1):
        yield


@contextmanager
def configured(connection: redis.Redis, name: str, value: str | int) -> Iterator[None]:
    """Sets an option of the server within the context."""
    before = connection.config_get(name)[name]
    connection.config_set(name, value)
    try:
        yield
    finally:
        connection.config_set(name, before)


Fault = Callable[[redis.Redis], AbstractContextManager[None]]
FAULTS: dict[str, Fault] = {
    "BUSY": busy,
    "NOREPLICAS": without_replicas,
    "READONLY": demoted,
    "MASTERDOWN": orphaned,
    "OOM": full,
}
"""The faults, by the error code that the server then answers with."""


def strike(connection: redis.Redis, name: str, seconds: float) -> None:
    """Causes one of `FAULTS` for a while."""
    with FAULTS[name](connection):
        time.sleep(seconds)


def _reply(call: Callable[[], object]) -> str:
    try:
        return str(call())
    except redis.RedisError as error:
        return str(error)
