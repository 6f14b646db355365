"""Limits that containers and systemd set for a process, with control groups (cgroups, versions 1 and 2).

Other numbers of the kernel, such as the free memory in `/proc/meminfo`, describe the whole machine.
"""

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeVar

_Result = TypeVar("_Result")

NO_LIMIT = 1 << 60
"""A limit of this many bytes or more means none: version 1 then gives the largest number of pages."""
MAX_DEPTH = 64
"""Maximum number of nested control groups that are read."""


class MemoryLimit(NamedTuple):
    """The limit of the control group that leaves the least memory, in bytes."""

    num_bytes: int
    num_free_bytes: int
    """Memory that the group may still take; file pages that the kernel would drop count as free."""


def memory_limit(root: Path = Path("/")) -> MemoryLimit | None:
    """Returns the memory limit of this process's control groups, or None without one.

    `root`: the folder that has `proc` and `sys`; tests pass another one.
    """
    limits = [
        *(
            # Beyond `memory.high`, the kernel slows a group down until it nearly stands still.
            _memory(folder, name, "memory.current", "inactive_file")
            for folder in _groups(root, None)
            for name in ("memory.max", "memory.high")
        ),
        *(
            _memory(folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            for folder in _groups(root, "memory")
        ),
    ]
    return min((limit for limit in limits if limit), key=lambda limit: limit.num_free_bytes, default=None)


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Returns the CPU quota of this process's groups, as a number of CPUs; None without a quota."""
    quotas = [*map(_cpu_max, _groups(root, None)), *map(_cfs_quota, _groups(root, "cpu"))]
    return min((quota for quota in quotas if quota), default=None)


def num_usable_cores(root: Path = Path("/")) -> int:
    """Returns the number of cores that this process may use: by its affinity and the quota, at least 1."""
    num_cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        num_cores = len(os.sched_getaffinity(0))
    # If more threads ran than the quota pays for, all of them would stop at the end of each period.
    return max(1, math.floor(min(num_cores, cpu_quota(root) or math.inf)))


def _memory(folder: Path, limit_name: str, usage_name: str, droppable_name: str) -> MemoryLimit | None:
    num_bytes, usage = _read_number(folder / limit_name), _read_number(folder / usage_name)
    if num_bytes is None or usage is None or num_bytes >= NO_LIMIT:
        return None
    words = _read_words(folder / "memory.stat")
    counts = dict(zip(words[::2], words[1::2], strict=False))
    droppable = counts.get(droppable_name, "0")
    num_droppable = int(droppable) if droppable.isdecimal() else 0
    return MemoryLimit(num_bytes, max(0, num_bytes - usage + num_droppable))


def _cpu_max(folder: Path) -> float | None:
    """Returns the quota of a group of version 2. The file contains `QUOTA PERIOD`, or `max PERIOD`."""
    words = _read_words(folder / "cpu.max")
    return _ratio(*words) if len(words) == 2 else None


def _cfs_quota(folder: Path) -> float | None:
    """Returns the quota of a group of version 1. In the file, -1 means no quota."""
    words = [*_read_words(folder / "cpu.cfs_quota_us"), *_read_words(folder / "cpu.cfs_period_us")]
    return _ratio(*words) if len(words) == 2 else None


def _ratio(quota: str, period: str) -> float | None:
    is_set = quota.isdecimal() and period.isdecimal() and int(period) > 0
    return int(quota) / int(period) if is_set else None


def _groups(root: Path, controller: str | None) -> Iterator[Path]:
    """Yields the folders of this process's group and of all groups around it.

    `controller` is a controller of version 1; None stands for version 2.
    """
    path = _group_path(root, controller)
    mount = _find_mount(root, controller)
    if path is None or mount is None:
        return
    mounted_group, mount_point = mount
    try:
        inner = PurePosixPath(path).relative_to(mounted_group)
    except ValueError:
        # The mount shows only a part of the groups, as in a container: its top is then this process's group.
        inner = PurePosixPath()
    top = root / mount_point.lstrip("/")
    if ".." in inner.parts or not (top / inner).is_dir():
        inner = PurePosixPath()
    yield from (top / folder for folder in [inner, *inner.parents][:MAX_DEPTH])


def _group_path(root: Path, controller: str | None) -> str | None:
    """Returns the path of this process's group, from a line `ID:CONTROLLERS:PATH` in `/proc/self/cgroup`."""

    def is_wanted(controllers: str) -> bool:
        return controllers == "" if controller is None else controller in controllers.split(",")

    return _first(root / "proc/self/cgroup", lambda line: _split_group(line, is_wanted))


def _split_group(line: str, is_wanted: Callable[[str], bool]) -> str | None:
    parts = line.split(":", 2)
    return parts[2] if len(parts) == 3 and is_wanted(parts[1]) else None


def _find_mount(root: Path, controller: str | None) -> tuple[str, str] | None:
    """Returns the mounted group and its mount point, from `/proc/self/mountinfo` (see `proc(5)`)."""

    def parse(line: str) -> tuple[str, str] | None:
        mount, _, source = line.partition(" - ")
        fields, options = mount.split(), source.split()
        if len(fields) < 5 or len(options) < 3:
            return None
        is_wanted = (
            options[0] == "cgroup2"
            if controller is None
            else options[0] == "cgroup" and controller in options[2].split(",")
        )
        return (fields[3], fields[4]) if is_wanted else None

    return _first(root / "proc/self/mountinfo", parse)


def _first(file: Path, parse: Callable[[str], _Result | None]) -> _Result | None:
    """Returns the first result of `parse` for a line of `file`; None without a result, or without a file."""
    results = map(parse, _read(file).splitlines())
    return next((result for result in results if result is not None), None)


def _read_number(file: Path) -> int | None:
    text = _read(file).strip()
    return int(text) if text.isdecimal() else None


def _read_words(file: Path) -> list[str]:
    return _read(file).split()


def _read(file: Path) -> str:
    """Returns a file's text; an empty text if this process can't read the file."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
