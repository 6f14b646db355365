"""Limits of control groups, read from files as kernels and containers show them."""

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from shared import control_groups
from shared.control_groups import MemoryLimit, cpu_quota, memory_limit, num_usable_cores

MIB = 1 << 20
V2 = "29 23 0:26 {root} /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "33 23 0:30 {root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "36 23 0:32 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "41 23 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
)
UNLIMITED_V1 = "9223372036854771712"


def machine(root: Path, *, mounts: str, groups: str, files: Mapping[str, str]) -> Path:
    """A folder with the files of `/proc` and `/sys/fs/cgroup`; returns it."""
    proc = {"proc/self/mountinfo": mounts, "proc/self/cgroup": groups}
    for name, text in (proc | {f"sys/fs/cgroup/{name}": text for name, text in files.items()}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_container_with_version_2_has_the_limits_at_the_top_of_its_mount(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        mounts=V2.format(root="/"),
        groups="0::/\n",
        files={
            "memory.max": f"{1000 * MIB}\n",
            "memory.high": "max\n",
            "memory.current": f"{700 * MIB}\n",
            "memory.stat": f"anon {400 * MIB}\ninactive_file {200 * MIB}\n",
            "cpu.max": "250000 100000\n",
        },
    )
    assert memory_limit(root) == MemoryLimit(1000 * MIB, 500 * MIB)
    assert cpu_quota(root) == 2.5


def test_the_tightest_of_nested_groups_counts(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        mounts=V2.format(root="/"),
        groups="0::/system.slice/lorelay.service\n",
        files={
            "system.slice/memory.max": f"{900 * MIB}",
            "system.slice/memory.current": f"{850 * MIB}",
            "system.slice/cpu.max": "50000 100000",
            "system.slice/lorelay.service/memory.max": "max",
            "system.slice/lorelay.service/memory.high": f"{800 * MIB}",
            "system.slice/lorelay.service/memory.current": f"{100 * MIB}",
            "system.slice/lorelay.service/cpu.max": "max 100000",
        },
    )
    assert memory_limit(root) == MemoryLimit(900 * MIB, 50 * MIB)
    assert cpu_quota(root) == 0.5
    assert num_usable_cores(root) == 1


@pytest.mark.parametrize("mounted", ["/docker/abc", "/"])
def test_version_1_is_read_in_containers_and_outside(tmp_path: Path, mounted: str) -> None:
    at = "" if mounted != "/" else "/docker/abc"
    root = machine(
        tmp_path,
        mounts=V1.format(root=mounted),
        groups="9:name=systemd:/\n4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/\n",
        files={
            f"memory{at}/memory.limit_in_bytes": f"{512 * MIB}",
            f"memory{at}/memory.usage_in_bytes": f"{500 * MIB}",
            f"memory{at}/memory.stat": f"inactive_file 1\ntotal_inactive_file {88 * MIB}\n",
            f"cpu,cpuacct{at}/cpu.cfs_quota_us": "300000",
            f"cpu,cpuacct{at}/cpu.cfs_period_us": "100000",
        },
    )
    assert memory_limit(root) == MemoryLimit(512 * MIB, 100 * MIB)
    assert cpu_quota(root) == 3.0


@pytest.mark.parametrize(
    ("mounts", "groups", "files"),
    [
        ("", "", {}),
        ("nonsense\n - \n1 2\n", "nonsense\n0::\n", {}),
        (V2.format(root="/"), "0::/\n", {}),
        (V2.format(root="/"), "0::/../../other\n", {"memory.max": "max", "cpu.max": "max 100000"}),
        (V2.format(root="/"), "0::/\n", {"memory.max": "many", "memory.current": "1", "cpu.max": "1 0"}),
        (
            V1.format(root="/"),
            "4:memory:/\n3:cpu,cpuacct:/\n",
            {
                "memory/memory.limit_in_bytes": UNLIMITED_V1,
                "memory/memory.usage_in_bytes": "1",
                "cpu,cpuacct/cpu.cfs_quota_us": "-1",
                "cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
        ),
    ],
)
def test_without_a_limit_that_can_be_read_there_is_none(
    tmp_path: Path, mounts: str, groups: str, files: Mapping[str, str]
) -> None:
    root = machine(tmp_path, mounts=mounts, groups=groups, files=files)
    assert memory_limit(root) is None
    assert cpu_quota(root) is None
    assert num_usable_cores(root) == len(os.sched_getaffinity(0))


def test_a_machine_without_these_files_has_no_limit(tmp_path: Path) -> None:
    assert memory_limit(tmp_path) is None
    assert cpu_quota(tmp_path) is None


@pytest.mark.parametrize(("quota", "expected"), [(None, 4), (8.0, 4), (2.9, 2), (0.3, 1)])
def test_cores_are_bounded_by_the_quota_rounded_down(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr(control_groups, "cpu_quota", lambda root: quota)
    assert num_usable_cores() == expected
