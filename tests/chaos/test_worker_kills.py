"""Workers that are killed: every stream goes on at another worker, exactly where it stopped."""

import time

import pytest

from tests.chaos.checker import Reference, check_complete
from tests.chaos.cluster import FAILOVER_LIMIT_S, Cluster
from tests.chaos.conftest import Measure
from tests.chaos.recorder import Recorder
from tests.chaos.stages import ASKS, STAGES, pick_victim
from tests.waiting import wait_until

RESTART_S = 5
"""Seconds without any worker when there is no spare one."""
POINTS = ["appended:20", "ended:1"]
MORE_POINTS = ["claimed:1", "appending:1", "appending:20", "appended:1", "ending:1", "ending:3", "ended:3"]


def long(*values: str) -> list[object]:
    return [pytest.param(value, marks=pytest.mark.long) for value in values]


@pytest.mark.parametrize("stage", STAGES)
def test_the_streams_of_a_killed_worker_go_on_at_a_spare_one(
    cluster: Cluster, recorder: Recorder, reference: Reference, measure: Measure, stage: str
) -> None:
    workers = cluster.ensure_workers(2)
    run = recorder.start(cluster.api.url, ASKS)
    pick_victim(workers, stage).kill()
    killed_at = time.monotonic()
    check_complete(run.wait(), reference)
    measure("longest pause", run.longest_pause_s(killed_at), FAILOVER_LIMIT_S)
    cluster.start_worker(wait=False)


@pytest.mark.parametrize("stage", ["in the middle", *long(*(set(STAGES) - {"in the middle"}))])
def test_the_streams_of_the_only_worker_wait_for_its_restart(
    cluster: Cluster, recorder: Recorder, reference: Reference, measure: Measure, stage: str
) -> None:
    workers = cluster.ensure_workers(1)
    run = recorder.start(cluster.api.url, ASKS)
    pick_victim(workers, stage).kill()
    time.sleep(RESTART_S)
    cluster.start_worker()
    restarted_at = time.monotonic()
    check_complete(run.wait(), reference)
    measure("longest pause after the restart", run.longest_pause_s(restarted_at), FAILOVER_LIMIT_S)


@pytest.mark.parametrize("point", [*POINTS, *long(*MORE_POINTS)])
def test_a_worker_killed_at_an_internal_point_loses_and_doubles_nothing(
    cluster: Cluster, recorder: Recorder, reference: Reference, point: str
) -> None:
    cluster.ensure_workers(1)
    victim = cluster.start_worker(faults=f"kill={point}")
    load = recorder.keep_busy(cluster.api.url, ASKS, num_clients=len(ASKS))
    wait_until(lambda: not victim.is_running, 60, "the fault")
    check_complete(load.stop(), reference)
