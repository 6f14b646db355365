"""The engine by itself: what it loads."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[4]
HEAVY = {"redis", "rq", "torch", "numpy", "transformers", "worker.serving", "worker.model"}


def test_importing_the_engine_loads_neither_queue_nor_tensors() -> None:
    code = "import sys, worker.engine.engine; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    assert "worker.engine.scheduler" in loaded
    assert not HEAVY & set(loaded)
