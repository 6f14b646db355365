"""`scripts/bench` on the tiny model: every row comes, whatever its figure."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from bench import memory, run
from bench.served import KEYS
from shared.messages import ForwardState
from tests.deployment import Deployment

PNG = b"\x89PNG"
# A row may wait until the forward pass is compiled, at the lowest priority, beside other tests.
pytestmark = pytest.mark.timeout(400)


def bench(folder: Path, *arguments: str) -> dict[str, Any]:
    """The rows of a run; it must end well."""
    assert run.main(["--smoke", "--out", str(folder), *arguments]) == 0
    assert (folder / "chart.png").read_bytes().startswith(PNG)
    rows: dict[str, Any] = json.loads((folder / "rows.json").read_text())["rows"]
    return rows


def test_the_costs_of_redis_are_measured_on_a_deployment_of_its_own(tiny_model: Path, tmp_path: Path) -> None:
    rows = bench(tmp_path, "--model", str(tiny_model), "--only", "append", "engine-redis")
    assert 0 < rows["append"]["value"] < 1000
    assert rows["engine-redis"]["value"] == 0, "the engine's thread talked to Redis"
    assert not rows["engine-redis"]["detail"].endswith(" in 0 calls"), "no thread did: nothing is measured"
    assert "append script" in (tmp_path / "table.txt").read_text()


def test_adapters_come_from_where_the_rows_say(tiny_model: Path, tmp_path: Path) -> None:
    rows = bench(tmp_path, "--model", str(tiny_model), "--only", "cached", "disk")
    assert {"cached", "disk"} == rows.keys()
    states = re.findall(r"; forward pass (\w+)", (tmp_path / "table.txt").read_text())
    assert states == [ForwardState.COMPILED if shutil.which("g++") else ForwardState.EAGER]


def test_any_server_can_be_measured(served: Deployment, tiny_model: Path, tmp_path: Path) -> None:
    place = ["--base-url", served.api_url, "--models", "tiny,a,b", "--model", str(tiny_model)]
    rows = bench(tmp_path, *place, "--only", "mixed-base", "gap")
    assert {"mixed-base", "gap"} == rows.keys()
    assert all(row["value"] > 0 for row in rows.values())


def test_a_row_that_fails_says_why_and_the_run_ends_with_an_error(tiny_model: Path, tmp_path: Path) -> None:
    nobody = ["--base-url", "http://127.0.0.1:9", "--models", "tiny", "--model", str(tiny_model)]
    assert run.main(["--smoke", "--out", str(tmp_path), *nobody, "--only", "base"]) == 1
    assert "failed: " in (tmp_path / "table.txt").read_text()


def test_the_memory_of_a_worker_is_watched_while_adapters_come_and_go(
    tiny_model: Path, tmp_path: Path
) -> None:
    result = memory.run(
        tmp_path,
        str(tiny_model),
        num_adapters=6,
        duration_s=5,
        interval_s=0.5,
        max_cached_adapter_bytes="1",
    )
    assert not result.faults
    assert result.num_requests > 0
    assert result.after.num_reads > 0
    assert result.after.num_resident == memory.CONCURRENCY
    assert result.after.num_cached_bytes == 0


@pytest.mark.long
@pytest.mark.timeout(600)
def test_every_row_is_measured(tiny_model: Path, tmp_path: Path) -> None:
    rows = bench(tmp_path, "--model", str(tiny_model))
    assert set(KEYS) < rows.keys()
    assert not [key for key, row in rows.items() if row["value"] is None]
