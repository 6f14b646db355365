"""Streams read by the official clients and by others, each with its own code, across every kind of fault."""

import signal
import time
from collections.abc import Iterable, Iterator

import pytest

from api.responses import KEEP_ALIVE_S
from tests.chaos.checker import Reference
from tests.chaos.cluster import ChaosApi, ChaosWorker, Cluster
from tests.chaos.node import node_readers, resuming_node_readers
from tests.chaos.readers import (
    READERS,
    RESUMING,
    Readers,
    Reading,
    check_broken_readings,
    check_complete_readings,
)
from tests.chaos.recorder import Run
from tests.chaos.stages import ASKS
from tests.waiting import wait_until

PAUSE_S = 15
"""The length of a pause: comments come after `KEEP_ALIVE_S` of silence."""
FIRST_COMMENT_S = 0.2
SLOW = {"step_delay_s": "0.05", "drain_s": "0.2"}
"""A worker so slow that clients which come back have begun again long before the others are through."""


@pytest.fixture(scope="module")
def api(shared_cluster: Cluster) -> Iterator[ChaosApi]:
    """An API that soon says that a request is queued."""
    api = shared_cluster.start_api(first_event_wait_s=str(FIRST_COMMENT_S))
    yield api
    api.process.kill()
    shared_cluster.apis.remove(api)


@pytest.fixture(params=["Python", pytest.param("Node", marks=pytest.mark.long)])
def readers(shared_cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Readers]:
    """The clients of one language; one that shows comments is among them."""
    plain, resuming = READERS, RESUMING
    if request.param == "Node":
        script = request.getfixturevalue("node_script")
        plain = node_readers(script) | {"requests": READERS["requests"]}
        resuming = resuming_node_readers(script)
    with Readers(shared_cluster.server.url, plain, resuming) as readers:
        yield readers


def start_slow_worker(cluster: Cluster) -> ChaosWorker:
    """The only worker."""
    cluster.ensure_workers(0)
    return cluster.start_worker(**SLOW)


def check_open(readings: Iterable[Reading]) -> None:
    """None of these streams has ended."""
    ended = {reading.name: reading.failure or reading.errors for reading in readings if reading.ended_at}
    assert not ended


def queue_all(cluster: Cluster, readers: Readers, api_url: str, other_url: str) -> tuple[list[Reading], Run]:
    """A stream for every client, all in the queue; call it while the workers are suspended."""
    readings, run = readers.start_all(api_url, other_url, ASKS)

    def are_queued() -> bool:
        check_open(readings)
        return len(cluster.queued_ids()) == len(readings)

    wait_until(are_queued, 30, "all in the queue")
    return readings, run


def begin_all(cluster: Cluster, readers: Readers, api_url: str, other_url: str) -> tuple[list[Reading], Run]:
    """A stream for every client, all with some text, and none at its end."""
    with cluster.suspended():
        readings, run = queue_all(cluster, readers, api_url, other_url)

    def are_under_way() -> bool:
        check_open(readings)
        return all(reading.is_under_way for reading in readings)

    wait_until(are_under_way, 30, "text for all")
    return readings, run


def test_a_stream_that_waits_in_the_queue_begins_for_every_client(
    cluster: Cluster, readers: Readers, reference: Reference, api: ChaosApi
) -> None:
    cluster.ensure_workers(1)
    with cluster.suspended():
        readings, run = queue_all(cluster, readers, api.url, cluster.api.url)
        time.sleep(2 * FIRST_COMMENT_S)
    run.wait()
    check_complete_readings(readings, reference)
    assert all(reading.num_comments for reading in readings if reading.client == "requests")


def test_a_stream_that_pauses_goes_on_for_every_client(
    cluster: Cluster, readers: Readers, reference: Reference, api: ChaosApi
) -> None:
    worker = start_slow_worker(cluster)
    readings, run = begin_all(cluster, readers, cluster.api.url, api.url)
    worker.freeze()
    time.sleep(PAUSE_S)
    worker.thaw()
    run.wait()
    check_complete_readings(readings, reference)
    assert all(reading.longest_pause_s() > KEEP_ALIVE_S for reading in readings)
    assert all(reading.num_comments for reading in readings if reading.client == "requests")


def test_a_stream_goes_on_for_every_client_when_one_worker_is_killed_and_the_next_drained(
    cluster: Cluster, readers: Readers, reference: Reference, api: ChaosApi
) -> None:
    first = start_slow_worker(cluster)
    readings, run = begin_all(cluster, readers, cluster.api.url, api.url)
    first.kill()
    second = cluster.start_worker(**SLOW)
    wait_until(lambda: len(second.owned_ids()) == len(readings), 30, "all at the second worker")
    cluster.start_worker(wait=False)
    second.terminate()
    run.wait()
    check_complete_readings(readings, reference)
    assert "requests back" in second.process.output


def test_an_api_that_ends_tells_every_client_by_one_error_and_another_goes_on(
    cluster: Cluster, readers: Readers, reference: Reference
) -> None:
    start_slow_worker(cluster)
    api = cluster.start_api(api_drain_s="0.2")
    readings, run = begin_all(cluster, readers, api.url, api.url)
    api.process.send(signal.SIGTERM)
    run.wait()
    check_broken_readings(readings, reference, "server_draining")
    back = [reading for reading in readings if reading.client.startswith("httpx-sse") and reading.last_id]
    for reading in back:
        readers.come_back(cluster.api.url, reading)
    check_complete_readings(back, reference)
    api.process.wait()
    cluster.apis.remove(api)
