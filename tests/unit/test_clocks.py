"""Durations in the code are measured by monotonic clocks, leases and deadlines by the clock of Redis."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
WALL_CLOCK = re.compile(r"time\.time\(|time_ns\(|datetime\.(now|utcnow|today)\(|localtime\(|gmtime\(")
DATES = {
    "api/generation.py": "`created` in answers",
    "worker/model/adapter_store.py": "`created` of an adapter in `/v1/models`",
    "worker/model/startup.py": "`created` of the base in `/v1/models`",
    "worker/model/kernels/build_cache.py": "the age of files in the cache folder",
}
"""The files that may read the wall clock, each with what the date is for."""


def test_only_dates_are_read_from_a_clock_that_may_jump() -> None:
    files = [
        file for folder in ("api", "lorelay", "shared", "worker") for file in (ROOT / folder).rglob("*.py")
    ]
    reading = {str(file.relative_to(ROOT)) for file in files if WALL_CLOCK.search(file.read_text("utf-8"))}
    assert len(files) > 50
    assert reading == DATES.keys()


def test_scripts_know_no_other_clock_than_that_of_redis() -> None:
    for script in (ROOT / "shared" / "queue" / "lua").glob("*.lua"):
        assert not re.search(r"\bos\.(time|clock|date)\b", script.read_text("utf-8")), script.name
