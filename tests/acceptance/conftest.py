"""The demo model and its adapters, and `lorelay serve` on them."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deployment import BIN, ROOT, Deployment
from tests.redis_server import free_port

ADAPTERS = ROOT / "demo" / "adapters"


@pytest.fixture(scope="session")
def demo_model() -> str:
    """The folder of the demo model; downloaded if it isn't there."""
    command = [sys.executable, "-m", "demo.model"]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


class ServedModel(Deployment):
    """`lorelay serve`, in a state folder of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        super().__init__("", folder)
        port = free_port()
        command = [str(BIN / "lorelay"), "serve", *arguments]
        command += ["--server-name", "127.0.0.1", "--server-port", str(port)]
        self.state_dir = folder / "state"
        self.process = self.start([*command, "--state-dir", str(self.state_dir)])
        self.api_url = f"http://127.0.0.1:{port}"
        try:
            self.process.wait_for("is ready")
        except BaseException:
            self.process.stop()
            raise

    def close(self) -> None:
        for client in self._clients:
            client.close()
        if self.process.is_running:
            assert self.process.stop() == 0, self.process.output


@pytest.fixture(scope="module")
def served(demo_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    """The base and both demo adapters."""
    adapters = [f"{name}={ADAPTERS / name}" for name in ("pirate", "sentiment")]
    folder = tmp_path_factory.mktemp("serve")
    with ServedModel(folder, demo_model, "--adapters", *adapters) as deployment:
        yield deployment
