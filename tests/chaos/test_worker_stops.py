"""Workers that stall, drain, hang, or come and go: no request is lost, none is answered twice."""

import time

import pytest

from tests.chaos.checker import Reference, check_complete
from tests.chaos.cluster import FAILOVER_LIMIT_S, LEASE_S, Cluster
from tests.chaos.conftest import Measure
from tests.chaos.recorder import Recorder, workload
from tests.chaos.stages import ASKS, pick_victim
from tests.waiting import wait_until

HUNG_EXIT_CODE = 70
HAND_OVER_LIMIT_S = 1.0
"""The longest pause of a stream that is handed back, where nobody has to wait for a lease."""


def test_a_worker_stopped_for_three_leases_finds_its_requests_gone_and_serves_on(
    cluster: Cluster, recorder: Recorder, reference: Reference, measure: Measure
) -> None:
    workers = cluster.ensure_workers(2)
    run = recorder.start(cluster.api.url, ASKS)
    victim = pick_victim(workers)
    victim.freeze()
    frozen_at = time.monotonic()
    time.sleep(3 * LEASE_S)
    victim.thaw()
    check_complete(run.wait(), reference)
    measure("longest pause", run.longest_pause_s(frozen_at), FAILOVER_LIMIT_S)
    wait_until(lambda: "moved to another worker" in victim.process.output, what="the news at the victim")
    run = recorder.start(cluster.api.url, [*ASKS, *ASKS])  # More than the other one takes.
    wait_until(victim.owned_ids, what="requests at the worker that woke up")
    check_complete(run.wait(), reference)
    assert victim.is_running


def test_a_worker_with_time_to_drain_finishes_what_it_runs(
    cluster: Cluster, recorder: Recorder, reference: Reference
) -> None:
    workers = cluster.ensure_workers(2)
    run = recorder.start(cluster.api.url, ASKS)
    victim = pick_victim(workers)
    victim.terminate()
    check_complete(run.wait(), reference)
    assert victim.process.wait() == 0
    assert "handed" not in victim.process.output


@pytest.mark.parametrize(
    "how", ["its time is over", pytest.param("it is asked twice", marks=pytest.mark.long)]
)
def test_a_worker_that_drains_in_a_hurry_hands_back_what_it_runs(
    cluster: Cluster, recorder: Recorder, reference: Reference, measure: Measure, how: str
) -> None:
    cluster.start_companion()
    victim = cluster.start_worker(drain_s="0.2" if how == "its time is over" else "30")
    run = recorder.start(cluster.api.url, ASKS)
    pick_victim([victim])
    victim.terminate()
    if how == "it is asked twice":
        wait_until(lambda: "draining" in victim.process.output, what="the first SIGTERM")
        victim.terminate()
    drained_at = time.monotonic()
    check_complete(run.wait(), reference)
    assert victim.process.wait() == 0
    assert "requests back" in victim.process.output
    measure("longest pause", run.longest_pause_s(drained_at), HAND_OVER_LIMIT_S)


@pytest.mark.long
def test_workers_replaced_one_after_another_under_load_fail_no_request(
    cluster: Cluster, recorder: Recorder, reference: Reference
) -> None:
    old = cluster.ensure_workers(2)
    load = recorder.keep_busy(cluster.api.url, ASKS, num_clients=12)
    for worker in old:
        cluster.start_worker()
        worker.terminate()
        assert worker.process.wait() == 0
    check_complete(load.stop(), reference)


def test_one_worker_becomes_four_and_one_again_under_load_without_a_failed_request(
    cluster: Cluster, recorder: Recorder, reference: Reference
) -> None:
    cluster.ensure_workers(1)
    load = recorder.keep_busy(cluster.api.url, ASKS, num_clients=32)
    surplus = [cluster.start_worker(wait=False, drain_s=drain_s) for drain_s in ("0.2", "30", "30")]
    for worker in surplus:
        worker.wait_until_serving()
        wait_until(worker.owned_ids, 30, "requests at the new worker")
    for worker in surplus:
        worker.terminate()
        assert worker.process.wait() == 0
    check_complete(load.stop(), reference)


def test_a_worker_whose_engine_hangs_ends_with_an_error_and_its_requests_move(
    cluster: Cluster, recorder: Recorder, reference: Reference, measure: Measure
) -> None:
    cluster.start_companion()
    victim = cluster.start_worker(faults="hang=30", step_limit_s="1")
    run = recorder.start(cluster.api.url, ASKS)
    assert victim.process.wait() == HUNG_EXIT_CODE
    ended_at = time.monotonic()
    assert "a step has taken over 1 s" in victim.process.output
    check_complete(run.wait(), reference)
    measure("longest pause after the end", run.longest_pause_s(ended_at), FAILOVER_LIMIT_S)


@pytest.mark.long
def test_a_step_slower_than_the_lease_moves_nothing(
    cluster: Cluster, recorder: Recorder, reference: Reference
) -> None:
    asks = workload(4, max_tokens=3, tag="slow")
    reference.prepare(asks)
    cluster.ensure_workers(0)
    workers = [cluster.start_worker(wait=False, step_delay_s=str(1.5 * LEASE_S)) for _ in range(2)]
    for worker in workers:
        worker.wait_until_serving()
    run = recorder.start(cluster.api.url, asks)
    check_complete(run.wait(), reference)
    assert not any("lost its worker" in worker.process.output for worker in workers)
