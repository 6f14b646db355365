"""Both servers, Valkey and Redis 6.2: each test of the scripts runs on an empty one."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from tests.redis_server import BINARIES, RedisServer
from tests.streams import BlockingApi


@pytest.fixture(scope="module", params=list(BINARIES))
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server of each kind; its folder has a short path, because its socket lies there."""
    folder = Path("/tmp") / f"lorelay-scripts-{tmp_path_factory.mktemp('s').name}-{request.param_index}"
    with RedisServer(BINARIES[request.param](), folder) as server:
        yield server
    shutil.rmtree(folder)


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
