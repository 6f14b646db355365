"""Sizes that follow from the free memory, and from the limit of the control group."""

import pytest
import torch

from shared.control_groups import MemoryLimit
from shared.errors import ConfigurationError
from shared.settings import WorkerSettings
from worker.model import memory

CPU = torch.device("cpu")
MIB = 1 << 20
AVAILABLE = 4000 * MIB


@pytest.fixture(
    params=[None, MemoryLimit(1000 * MIB, 500 * MIB), MemoryLimit(9000 * MIB, 5000 * MIB)], ids=str
)
def limit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> MemoryLimit | None:
    monkeypatch.setattr(memory, "_num_available_bytes", lambda: AVAILABLE)
    monkeypatch.setattr(memory, "memory_limit", lambda: request.param)
    limit: MemoryLimit | None = request.param
    return limit


def test_cache_and_adapters_take_shares_of_what_the_control_group_leaves(limit: MemoryLimit | None) -> None:
    num_free = min(AVAILABLE, limit.num_free_bytes if limit else AVAILABLE)
    assert memory.adapter_bytes(CPU) == num_free // 10
    settings = WorkerSettings(model="m", block_size=16, max_batch_size=512, cache_max_bytes=8000 * MIB)
    num_blocks = memory.num_cache_blocks(settings, CPU, max_model_len=64, num_block_bytes=MIB)
    assert num_blocks == int(num_free * 0.8) // MIB


def test_the_line_at_the_start_says_what_limits_the_memory(limit: MemoryLimit | None) -> None:
    line = memory.describe_limits()
    if limit and limit.num_free_bytes < AVAILABLE:
        assert line.startswith("500 MiB of memory free by the control group's limit of 1000 MiB; ")
    else:
        assert line.startswith("4000 MiB of memory free on the machine; ")
    assert f"{torch.get_num_threads()} CPU threads" in line


def test_the_line_at_the_start_tells_a_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "cpu_quota", lambda: 1.5)
    assert memory.describe_limits().endswith("CPU threads, control group's quota: 1.5 CPUs")


def test_a_limit_too_small_for_one_sequence_is_refused_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory, "memory_limit", lambda: MemoryLimit(1000 * MIB, 0))
    with pytest.raises(ConfigurationError, match=r"LORELAY_SESSION_LEN.*control group's limit of 1000 MiB"):
        memory.num_cache_blocks(WorkerSettings(model="m"), CPU, max_model_len=64, num_block_bytes=MIB)
