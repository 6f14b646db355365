"""Fixtures for all tests."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import redis

from tests.redis_server import BINARIES, RedisServer, choose_server, server_binary, short_folder

if TYPE_CHECKING:
    from tests.forked import Nursery


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--server`, which chooses the server that the tests use."""
    parser.addoption("--server", choices=list(BINARIES), default="valkey", help="[default: %(default)s]")


def pytest_configure(config: pytest.Config) -> None:
    """Chooses the server program before anything starts one."""
    choose_server(config.getoption("--server"))


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """A real server for all tests of a process; `connection` empties it for each test."""
    with short_folder() as folder, RedisServer(server_binary(), folder) as server:
        yield server


@pytest.fixture
def connection(redis_server: RedisServer) -> Iterator[redis.Redis]:
    """A client of an empty server."""
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
        yield client


@pytest.fixture(scope="session")
def nursery() -> Iterator["Nursery"]:
    """The nursery that workers are forked from; it imports torch while the test goes on."""
    # Most unit tests start no process and need none of these imports.
    from tests.forked import Nursery

    with Nursery() as nursery:
        yield nursery
