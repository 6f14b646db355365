"""A tiny model with adapters on disk, and deployments that serve it."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from tests.deployment import Deployment
from tests.forked import Nursery
from tests.redis_server import RedisServer, server_binary
from tests.tiny_models import build_adapter, build_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random llama, called `tiny`."""
    return build_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_adapters(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Path]:
    """Two adapters of `tiny`, of different ranks and targets."""
    folder = tmp_path_factory.mktemp("adapters")
    everywhere = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return {
        "a": build_adapter(folder / "a", tiny_model, rank=8),
        "b": build_adapter(folder / "b", tiny_model, rank=4, targets=everywhere, seed=1),
    }


@pytest.fixture(scope="session")
def tiny_settings(tiny_model: Path, tiny_adapters: dict[str, Path]) -> dict[str, str]:
    """A worker's settings for `tiny` with its adapters."""
    return {
        "model": str(tiny_model),
        "adapters": " ".join(f"{name}={path}" for name, path in tiny_adapters.items()),
        "dtype": "float64",
        "num_threads": "1",
        "lease_s": "2",
        "heartbeat_s": "0.5",
    }


@pytest.fixture
def deploy(
    redis_server: RedisServer,
    connection: redis.Redis,
    nursery: Nursery,
    tiny_settings: dict[str, str],
    tmp_path: Path,
) -> Iterator[Callable[..., Deployment]]:
    """Makes deployments of `tiny` with its adapters over an empty server; keywords change settings."""
    deployments: list[Deployment] = []

    def make(**settings: str) -> Deployment:
        deployments.append(Deployment(redis_server.url, tmp_path, nursery, **(tiny_settings | settings)))
        return deployments[-1]

    yield make
    for deployment in deployments:
        deployment.close()


@pytest.fixture(scope="module")
def served(
    nursery: Nursery, tiny_settings: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    """One worker and one API on a server of their own, for tests that don't disturb them."""
    folder = tmp_path_factory.mktemp("served")
    with tempfile.TemporaryDirectory(prefix="lorelay-") as server_folder:
        server = RedisServer(server_binary(), Path(server_folder))
        with server, Deployment(server.url, folder, nursery, **tiny_settings) as deployment:
            deployment.start_worker()
            deployment.start_api()
            yield deployment
