"""States of a real server in which it answers "not now", each for the time of a context."""

import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

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
def unsaved(connection: redis.Redis) -> Iterator[None]:
    """MISCONF: the server could not write its last snapshot, because a folder has the name of the file."""
    folder = Path(connection.config_get("dir")["dir"]) / connection.config_get("dbfilename")["dbfilename"]
    folder.mkdir()
    try:
        # The server refuses writes only if it is to save snapshots on its own, too.
        with configured(connection, "save", "86400 1000000"):
            wait_until(lambda: not connection.info("persistence")["rdb_bgsave_in_progress"])
            connection.bgsave()
            wait_until(lambda: connection.info("persistence")["rdb_last_bgsave_status"] == "err")
            yield
    finally:
        folder.rmdir()


@contextmanager
def disk_full(pid: int) -> Iterator[None]:
    """A process can't make any file longer; it gets an error if it ignores SIGXFSZ, as Python does."""
    inherited = resource.getrlimit(resource.RLIMIT_FSIZE)
    _limit_files(pid, (1, inherited[1]))
    try:
        yield
    finally:
        _limit_files(pid, inherited)


def _limit_files(pid: int, limits: tuple[int, int]) -> None:
    with suppress(ProcessLookupError):  # the process may have ended meanwhile
        resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)


@contextmanager
def without_space(connection: redis.Redis) -> Iterator[None]:
    """MISCONF: the server can't write to its append-only file, if it has one."""
    with disk_full(connection.info("server")["process_id"]):
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
    "MISCONF": unsaved,
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
