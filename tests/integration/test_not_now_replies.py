"""Real servers in every state that a test can bring about: what they say then is waited out."""

import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from shared.queue.connections import is_transient
from shared.queue.not_now import code_of, is_transient_reply, reply_of
from tests.redis_server import BINARIES, RedisServer, free_port
from tests.server_faults import BUSY_OPTIONS, FAULTS, LOOP, configured, demoted
from tests.waiting import wait_until

UNPROTECTED = ("--enable-protected-configs", "yes", "--enable-debug-command", "yes")
WRITE = "redis.call('SET', 'key', 'value')"


@pytest.fixture(scope="module", params=BINARIES)
def server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    with tempfile.TemporaryDirectory(prefix="lorelay-") as folder:
        options = BUSY_OPTIONS if request.param == "redis-6.2" else (*BUSY_OPTIONS, *UNPROTECTED)
        binary = BINARIES[request.param]()
        with RedisServer(binary, Path(folder), port=free_port(), options=options) as server:
            yield server


@pytest.fixture
def own_connection(server: RedisServer) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server.url) as client:
        client.flushall()
        yield client


def failure(call: Callable[[], object]) -> redis.RedisError:
    """The exception of a call that must fail."""
    with pytest.raises(redis.RedisError) as caught:
        call()
    return caught.value


def pipelined(connection: redis.Redis, *, transaction: bool) -> None:
    with connection.pipeline(transaction=transaction) as pipeline:
        pipeline.get("key")
        pipeline.set("key", "value")
        pipeline.execute()


@pytest.mark.parametrize("code", FAULTS)
def test_a_state_that_passes_is_known_by_its_reply_to_commands_scripts_and_pipelines(
    own_connection: redis.Redis, code: str
) -> None:
    with FAULTS[code](own_connection):
        errors = [
            failure(lambda: own_connection.set("key", "value")),
            failure(lambda: own_connection.eval(WRITE, 0)),
            failure(lambda: pipelined(own_connection, transaction=True)),
            failure(lambda: pipelined(own_connection, transaction=False)),
        ]
    # A replica without its master has two reasons to refuse a write.
    codes = {code, "READONLY"} if code == "MASTERDOWN" else {code}
    assert all(is_transient_reply(error) for error in errors)
    assert {code_of(error) for error in errors} <= codes
    assert own_connection.set("key", "value")


def in_background(call: Callable[[], object]) -> tuple[threading.Thread, list[redis.RedisError]]:
    """A call that waits at the server, and what it will raise."""
    errors: list[redis.RedisError] = []
    thread = threading.Thread(target=lambda: errors.append(failure(call)), name="waits")
    thread.start()
    return thread, errors


def test_a_wait_that_a_demotion_ends_is_taken_up_again(
    server: RedisServer, own_connection: redis.Redis
) -> None:
    with redis.Redis.from_url(server.url) as other:
        thread, errors = in_background(lambda: other.blpop(["doorbell"], timeout=30))
        wait_until(lambda: own_connection.info("clients")["blocked_clients"], what="the wait")
        with demoted(own_connection):
            thread.join()
    assert [code_of(error) for error in errors] == ["UNBLOCKED"]
    assert is_transient(errors[0])


def test_a_script_that_an_operator_killed_before_it_wrote_is_called_again(
    server: RedisServer, own_connection: redis.Redis
) -> None:
    with redis.Redis.from_url(server.url) as other:
        thread, errors = in_background(lambda: other.eval(LOOP, 0))
        wait_until(lambda: error_of_ping(own_connection, "BUSY"), what="the script")
        own_connection.script_kill()
        thread.join()
    assert reply_of(errors[0]).startswith("ERR Script killed by user")
    assert is_transient(errors[0])


def error_of_ping(connection: redis.Redis, code: str) -> redis.RedisError | None:
    """The server's reply; the test fails if it has another code."""
    try:
        connection.ping()
    except redis.RedisError as error:
        return error if code_of(error) == code else None
    return None


def test_a_script_that_is_lost_between_its_loading_and_its_call_is_called_again(
    own_connection: redis.Redis,
) -> None:
    error = failure(lambda: own_connection.evalsha("0" * 40, 0))
    assert code_of(error) == "NOSCRIPT"
    assert is_transient(error)


def test_a_server_without_a_free_connection_is_waited_for(
    server: RedisServer, own_connection: redis.Redis
) -> None:
    with (
        configured(own_connection, "maxclients", 1),
        redis.Redis.from_url(server.url, retry=None) as other,
    ):
        error = failure(other.ping)
    assert is_transient(error)


def test_a_server_that_reads_its_data_is_waited_for(server: RedisServer, own_connection: redis.Redis) -> None:
    for number in range(8):
        own_connection.set(f"key-{number}", os.urandom(1 << 20))
    with (
        redis.Redis.from_url(server.url) as other,
        redis.Redis.from_url(server.url, retry=None) as impatient,
        configured(own_connection, "key-load-delay", 100_000),
    ):
        thread = threading.Thread(target=lambda: other.execute_command("DEBUG", "RELOAD"), name="reload")
        thread.start()
        error = wait_until(lambda: error_of_ping(impatient, "LOADING"), what="LOADING")
        thread.join()
    assert is_transient(error)


def test_a_server_that_can_not_write_to_its_disk_is_waited_for(
    server: RedisServer, own_connection: redis.Redis, tmp_path: Path
) -> None:
    (tmp_path / "dump.rdb").mkdir()
    with (
        configured(own_connection, "dir", str(tmp_path)),
        configured(own_connection, "save", "3600 1000"),
    ):
        own_connection.set("key", "value")
        own_connection.bgsave()
        wait_until(lambda: own_connection.info("persistence")["rdb_last_bgsave_status"] == "err")
        errors = [
            failure(lambda: own_connection.set("key", "value")),
            failure(lambda: own_connection.eval(WRITE, 0)),
        ]
    assert [code_of(error) for error in errors] == ["MISCONF"] * 2
    assert all(is_transient(error) for error in errors)


def test_a_server_that_is_made_a_replica_of_nobody_keeps_its_data_over_a_restart(tmp_path: Path) -> None:
    """Or random faults would lose requests by themselves."""
    for name, binary in BINARIES.items():
        server = RedisServer(binary(), tmp_path / name, port=free_port(), append_only=True)
        with server, redis.Redis.from_url(server.url) as connection:
            connection.set("before", 1)
            with demoted(connection):
                wait_until(lambda c=connection: c.info("replication")["master_link_status"] == "down")
            connection.set("after", 1)
            server.kill()
            server.start()
            assert connection.exists("before", "after") == 2
