"""Fixtures for all tests."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from tests.redis_server import BINARIES, RedisServer, choose_server, server_binary


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--server`, which chooses the server that the tests use."""
    parser.addoption("--server", choices=list(BINARIES), default="valkey", help="[default: %(default)s]")


def pytest_configure(config: pytest.Config) -> None:
    """Chooses the server program before anything starts one."""
    choose_server(config.getoption("--server"))


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A real server for the whole run; `connection` empties it for each test."""
    folder = Path("/tmp") / f"lorelay-test-{tmp_path_factory.getbasetemp().name}"
    with RedisServer(server_binary(), folder) as server:
        yield server
    shutil.rmtree(folder)


@pytest.fixture
def connection(redis_server: RedisServer) -> Iterator[redis.Redis]:
    """A client of an empty server."""
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
        yield client
