"""API processes that die: their orphans end soon, the requests of others do not notice."""

import time

import pytest

from tests.chaos.checker import Reference, check_complete
from tests.chaos.cluster import API_LEASE_S, Cluster
from tests.chaos.conftest import Measure
from tests.chaos.recorder import Recorder, workload
from tests.chaos.stages import ASKS
from tests.waiting import wait_until


@pytest.mark.parametrize("num_streams", [32, pytest.param(64, marks=pytest.mark.long)])
def test_a_killed_api_takes_its_requests_with_it_and_harms_no_others(
    cluster: Cluster, recorder: Recorder, reference: Reference, measure: Measure, num_streams: int
) -> None:
    orphans = workload(num_streams, max_tokens=400, tag="orphan")
    cluster.ensure_workers(2)
    victim = cluster.start_api()
    run = recorder.start(victim.url, orphans)
    wait_until(lambda: run.num_started >= num_streams // 2, 60, "half of the streams")
    wait_until(lambda: len(cluster.known_ids()) == num_streams, what="all requests")
    ids = cluster.known_ids()
    others = recorder.start(cluster.api.url, ASKS)
    victim.process.kill()
    killed_at = time.monotonic()
    wait_until(lambda: not ids & cluster.known_ids(), 60, "the end of the orphans")
    measure("until the orphans were gone", time.monotonic() - killed_at, 2 * API_LEASE_S)
    assert all(answer.failure for answer in run.wait())
    check_complete(others.wait(), reference)
    for request_id in ids:
        assert cluster.connection.hget(f"rq:job:{request_id}", "status") in (b"canceled", None)
    cluster.apis.remove(victim)
