"""The proxy itself, between a plain client and a server."""

import random
import socket
from collections.abc import Iterator

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from shared.queue.scripts import script_source
from tests.chaos.proxy import Proxy, script_marker
from tests.redis_server import RedisServer, free_port, server_binary
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    folder = tmp_path_factory.mktemp("proxied")
    with RedisServer(server_binary(), folder, port=free_port()) as server:
        yield server


@pytest.fixture
def proxy(server: RedisServer) -> Iterator[Proxy]:
    with redis.Redis.from_url(server.url) as direct:
        direct.flushall()
    with Proxy(int(server.url.rpartition(":")[2])) as proxy:
        yield proxy


@pytest.fixture
def client(proxy: Proxy) -> Iterator[redis.Redis]:
    """A client that gives up at once."""
    with redis.Redis.from_url(proxy.url, socket_timeout=0.2, retry=Retry(NoBackoff(), 0)) as client:
        yield client


def test_a_reset_is_no_orderly_end_and_the_next_connection_works(proxy: Proxy, client: redis.Redis) -> None:
    with socket.create_connection(("127.0.0.1", proxy.port)) as connection:
        wait_until(lambda: proxy.num_links == 1, what="the link")
        assert proxy.reset_some(random.Random(1), share=0.0) == 0
        assert proxy.reset_all() == 1
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    assert client.ping()


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_black_hole_keeps_the_bytes_of_its_direction_until_it_is_released(
    proxy: Proxy, client: redis.Redis, server: RedisServer, direction: str
) -> None:
    client.ping()
    proxy.hold(up=direction == "up", down=direction == "down")
    with pytest.raises(redis.TimeoutError):
        client.set("x", "1")
    with redis.Redis.from_url(server.url) as other:
        assert other.exists("x") == (direction == "down")
        proxy.release()
        wait_until(lambda: other.exists("x"), what="the held command")
    assert client.ping()


def test_a_swallowed_reply_is_that_of_a_command_which_was_carried_out(
    proxy: Proxy, client: redis.Redis
) -> None:
    proxy.swallow_replies(b"MARK")
    client.set("x", "unmarked")
    with pytest.raises(redis.ConnectionError):
        client.set("x", "MARK")
    assert client.get("x") == b"MARK"
    assert proxy.num_swallowed == 1


def test_a_script_is_recognised_by_its_marker(proxy: Proxy, client: redis.Redis) -> None:
    sweep = client.register_script(script_source("sweep"))
    sweep(args=["tiny"])
    proxy.swallow_replies(script_marker("sweep"))
    client.register_script(script_source("reap"))
    with pytest.raises(redis.ConnectionError):
        sweep(args=["tiny"])


def test_a_refused_command_never_reaches_the_server(proxy: Proxy, client: redis.Redis) -> None:
    client.set("x", "before")
    proxy.refuse("BUSY me")
    with pytest.raises(redis.ResponseError, match="BUSY me"):
        client.set("x", "after")
    with client.pipeline() as pipeline, pytest.raises(redis.ResponseError, match="BUSY me"):
        pipeline.set("x", "after").set("x", "later").execute()
    proxy.refuse(None)
    assert client.get("x") == b"before"
