"""The memory bench turns its samples into a result, and growth into faults."""

import msgspec
import pytest

from bench.memory import ALLOWED_MIB, ALLOWED_TENSORS, Course, Sample, judge
from bench.watched import Holdings, Watch

HELD = Holdings(num_tensors=10, tensor_bytes=100, num_resident=4, num_cached_bytes=50, num_reads=0)
ENDED = "0 requests, 0 cache blocks in use"


def course(*worker_mib: float) -> Course:
    return Course([Sample(60.0 * n, 10 * n, mib, 40.0) for n, mib in enumerate(worker_mib)], num_requests=40)


def test_a_worker_that_grows_within_the_allowance_and_keeps_nothing_has_no_faults() -> None:
    result = judge(course(100, 100 + ALLOWED_MIB, 101, 103, 105), Watch(HELD, HELD), ENDED)
    assert not result.faults
    assert result.highest_mib == 100 + ALLOWED_MIB
    assert result.mib_per_minute == pytest.approx(2)


def test_failed_requests_are_counted_and_told() -> None:
    answered = course(100, 100)
    answered.errors += ["500: broken", "503: full"]
    result = judge(answered, Watch(HELD, HELD), ENDED)
    assert (result.num_requests, result.num_failed) == (40, 2)
    assert result.faults == ["2 requests failed, the first one with 500: broken"]


def test_growth_tensors_and_blocks_that_stay_are_faults() -> None:
    kept = msgspec.structs.replace(HELD, num_tensors=11 + ALLOWED_TENSORS)
    result = judge(course(100, 101 + ALLOWED_MIB), Watch(HELD, kept), "0 requests, 3 cache blocks in use")
    assert [fault.split()[2] for fault in result.faults] == ["grew", "kept", "ended"]
