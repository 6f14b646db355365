"""Both servers, Valkey and Redis 6.2: each test of the scripts runs on an empty one."""

from collections.abc import Iterator

import pytest
import redis

from tests.redis_server import BINARIES, RedisServer, short_folder
from tests.streams import BlockingApi


@pytest.fixture(scope="module", params=list(BINARIES))
def server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    """A server of each kind."""
    with short_folder() as folder, RedisServer(BINARIES[request.param](), folder) as server:
        yield server


@pytest.fixture
def connection(server: RedisServer) -> Iterator[redis.Redis]:
    """A client of the emptied server."""
    with redis.Redis.from_url(server.url) as client:
        client.flushall()
        yield client


@pytest.fixture
def api(server: RedisServer, connection: redis.Redis) -> BlockingApi:
    """The API's end of the emptied server."""
    return BlockingApi(server.url)
