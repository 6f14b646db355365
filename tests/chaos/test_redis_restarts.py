"""Redis is killed: with its append-only file nothing is lost, without it everybody is told and comes back."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from shared.queue import keys
from tests.chaos.checker import Reference, check_complete, check_expiry, check_partial, check_quiet
from tests.chaos.cluster import BASE, TTL_S, Cluster
from tests.chaos.conftest import Measure
from tests.chaos.recorder import Recorder, Run
from tests.chaos.stages import ASKS, pick_victim
from tests.forked import Nursery
from tests.waiting import wait_until

AWAY_S = 1.0
ERROR_LIMIT_S = 10
SERVE_LIMIT_S = 5


@contextmanager
def cluster_with_load(
    models: dict[str, str], nursery: Nursery, *, append_only: bool
) -> Iterator[tuple[Cluster, Recorder, Run]]:
    """Two workers and an API in the middle of 32 streams."""
    with (
        Cluster(models, nursery, append_only=append_only) as cluster,
        Recorder(cluster.server.url) as recorder,
    ):
        for _ in range(2):
            cluster.start_worker(wait=False)
        cluster.start_api()
        workers = cluster.ensure_workers(2)
        run = recorder.start(cluster.api.url, ASKS)
        pick_victim(workers)
        yield cluster, recorder, run


def restart(cluster: Cluster) -> float:
    """Kills the server, and starts it again after a while; when it was killed."""
    killed_at = time.monotonic()
    cluster.server.kill()
    wait_until(lambda: not cluster.api.is_ready, what="/ready to turn 503")
    time.sleep(AWAY_S)
    cluster.server.start()
    return killed_at


def test_accepted_requests_finish_after_a_restart_with_the_append_only_file(
    models: dict[str, str], nursery: Nursery, reference: Reference, measure: Measure
) -> None:
    with cluster_with_load(models, nursery, append_only=True) as (cluster, recorder, run):
        restart(cluster)
        restarted_at = time.monotonic()
        check_complete(run.wait(), reference)
        measure("longest pause after the restart", run.longest_pause_s(restarted_at), SERVE_LIMIT_S)
        assert cluster.api.is_ready
        check_complete(recorder.start(cluster.api.url, ASKS).wait(), reference)
        check_quiet(cluster.connection, BASE)
        check_expiry(cluster.connection, max_ttl_s=TTL_S)
        assert not cluster.take_complaints()
        assert all(worker.is_running for worker in cluster.workers)


def test_after_an_empty_restart_every_open_stream_ends_with_an_error_and_all_come_back(
    models: dict[str, str], nursery: Nursery, reference: Reference, measure: Measure
) -> None:
    with cluster_with_load(models, nursery, append_only=False) as (cluster, recorder, run):
        killed_at = restart(cluster)
        restarted_at = time.monotonic()
        wait_until(lambda: cluster.connection.hlen(keys.MODELS) == 3, 5 * SERVE_LIMIT_S, "the registry")
        check_complete(recorder.start(cluster.api.url, ASKS[:8]).wait(), reference)
        measure("first answers after the restart", time.monotonic() - restarted_at, SERVE_LIMIT_S)
        check_partial(run.wait(), reference)
        broken = [answer for answer in run.answers if not answer.is_complete]
        assert broken
        assert {answer.error_code for answer in broken} == {"generation_failed"}
        measure("last error", max(answer.ended_at for answer in broken) - killed_at, ERROR_LIMIT_S)
        assert cluster.api.is_ready
        check_quiet(cluster.connection, BASE)
        assert not cluster.take_complaints()
        assert all(worker.is_running for worker in cluster.workers)


@pytest.mark.long
def test_a_redis_that_stops_for_two_leases_and_goes_on_loses_nothing(
    models: dict[str, str], nursery: Nursery, reference: Reference, measure: Measure
) -> None:
    with cluster_with_load(models, nursery, append_only=False) as (cluster, _, run):
        cluster.server.freeze()
        time.sleep(2.0)
        cluster.server.thaw()
        thawed_at = time.monotonic()
        check_complete(run.wait(), reference)
        measure("longest pause after it", run.longest_pause_s(thawed_at), SERVE_LIMIT_S)
