"""Connections that are reset, black holes, replies that get lost: on the worker's side and on the API's."""

import random
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import NamedTuple

import pytest

from tests.chaos.checker import Reference, check_complete, check_expiry, check_partial, check_quiet
from tests.chaos.cluster import API_LEASE_S, BASE, FAILOVER_LIMIT_S, LEASE_S, TTL_S, Cluster
from tests.chaos.conftest import Measure
from tests.chaos.proxy import Proxy, script_marker
from tests.chaos.recorder import Ask, Recorder, workload
from tests.chaos.stages import ASKS, pick_victim
from tests.chaos.test_clients import client_of
from tests.forked import Nursery
from tests.waiting import wait_until

NUM_KILLS = 20
KILL_PAUSE_S = 0.1
DIRECTIONS = ["both", *(pytest.param(way, marks=pytest.mark.long) for way in ("up", "down"))]
LENGTHY = workload(24, max_tokens=120, tag="long")


class Wired(NamedTuple):
    """Two workers and an API, each behind a proxy of its own."""

    cluster: Cluster
    recorder: Recorder
    worker_proxies: tuple[Proxy, Proxy]
    api_proxy: Proxy


@pytest.fixture(scope="module")
def wired_cluster(models: dict[str, str], nursery: Nursery, reference: Reference) -> Iterator[Wired]:
    reference.prepare(LENGTHY)
    with ExitStack() as stack:
        cluster = stack.enter_context(Cluster(models, nursery, tcp=True))
        proxies = [stack.enter_context(Proxy(cluster.port)) for _ in range(3)]
        for proxy in proxies[:2]:
            cluster.start_worker(proxy.url, wait=False)
        cluster.start_api(proxies[2].url)
        cluster.ensure_workers(2)
        recorder = stack.enter_context(Recorder(cluster.server.url))
        yield Wired(cluster, recorder, (proxies[0], proxies[1]), proxies[2])


@pytest.fixture
def wired(wired_cluster: Wired) -> Iterator[Wired]:
    """Quiet, with both workers at work, before and after."""
    cluster = wired_cluster.cluster
    live = cluster.live_workers()
    for proxy in wired_cluster.worker_proxies:
        if not any(worker.url == proxy.url for worker in live):
            cluster.start_worker(proxy.url, wait=False)
    cluster.ensure_workers(2)
    yield wired_cluster
    for proxy in (*wired_cluster.worker_proxies, wired_cluster.api_proxy):
        proxy.swallow_replies(b"", count=0)
        proxy.release()
    check_quiet(cluster.connection, BASE)
    check_expiry(cluster.connection, max_ttl_s=TTL_S)
    assert not cluster.take_complaints()


def num_swallowed(wired: Wired) -> int:
    """Replies that the workers never got."""
    return sum(proxy.num_swallowed for proxy in wired.worker_proxies)


@pytest.mark.parametrize("side", ["worker", "api"])
def test_twenty_random_resets_lose_and_double_nothing(wired: Wired, reference: Reference, side: str) -> None:
    rng = random.Random(side)
    proxies = wired.worker_proxies if side == "worker" else (wired.api_proxy,)
    run = wired.recorder.start(wired.cluster.api.url, LENGTHY)
    wait_until(lambda: run.num_started == len(LENGTHY), 30, "all streams")
    num_reset = 0
    for _ in range(NUM_KILLS):
        num_reset += rng.choice(proxies).reset_some(rng)
        time.sleep(KILL_PAUSE_S)
    check_complete(run.wait(), reference)
    assert num_reset >= NUM_KILLS / 2


def test_requests_that_arrive_while_the_apis_connections_break_complete_or_fail_with_one_clear_error(
    wired: Wired, reference: Reference
) -> None:
    rng = random.Random(1)
    load = wired.recorder.keep_busy(wired.cluster.api.url, ASKS, num_clients=16)
    for _ in range(NUM_KILLS):
        wired.api_proxy.reset_some(rng)
        time.sleep(KILL_PAUSE_S)
    answers = load.stop()
    check_partial(answers, reference)
    assert {answer.error_code for answer in answers} <= {None, "queue_unavailable"}
    assert sum(answer.is_complete for answer in answers) > len(answers) / 2


@pytest.mark.parametrize(
    "script", ["claim", "append", "renew", pytest.param("sweep", marks=pytest.mark.long)]
)
def test_a_worker_that_never_hears_that_a_script_succeeded_loses_and_doubles_nothing(
    wired: Wired, reference: Reference, script: str
) -> None:
    run = wired.recorder.start(wired.cluster.api.url, ASKS)
    for proxy in wired.worker_proxies:
        proxy.swallow_replies(script_marker(script), count=2)
    swallowed = num_swallowed(wired)
    check_complete(run.wait(), reference)
    assert num_swallowed(wired) > swallowed


@pytest.mark.long
def test_an_append_whose_reply_is_lost_again_and_again_is_written_once(
    wired: Wired, reference: Reference
) -> None:
    load = wired.recorder.keep_busy(wired.cluster.api.url, ASKS, num_clients=16)
    for _ in range(10):
        marker, before = script_marker("append"), num_swallowed(wired)
        for proxy in wired.worker_proxies:
            proxy.swallow_replies(marker)
        wait_until(lambda before=before: num_swallowed(wired) > before, 30, "a lost reply")
    check_complete(load.stop(), reference)


def test_a_reaper_that_never_hears_what_it_reaped_loses_and_doubles_nothing(
    wired: Wired, reference: Reference, measure: Measure
) -> None:
    run = wired.recorder.start(wired.cluster.api.url, ASKS)
    victim = pick_victim(wired.cluster.workers)
    (spare,) = (proxy for proxy in wired.worker_proxies if proxy.url != victim.url)
    victim.kill()
    killed_at = time.monotonic()
    wait_until(lambda: len(victim.owned_ids()) > 0, what="requests to reap")
    spare.swallow_replies(script_marker("reap"), count=8)
    check_complete(run.wait(), reference)
    assert spare.num_swallowed
    measure("longest pause", run.longest_pause_s(killed_at), FAILOVER_LIMIT_S)


def test_a_drained_worker_that_never_hears_that_it_handed_back_ends_well(
    wired: Wired, reference: Reference
) -> None:
    proxy = wired.worker_proxies[0]
    (former,) = (worker for worker in wired.cluster.workers if worker.url == proxy.url)
    former.kill()
    victim = wired.cluster.start_worker(proxy.url, drain_s="0.1")
    run = wired.recorder.start(wired.cluster.api.url, [*ASKS, *LENGTHY])  # More than the other one takes.
    pick_victim([victim])
    swallowed = proxy.num_swallowed
    proxy.swallow_replies(script_marker("hand_back"))
    victim.terminate()
    check_complete(run.wait(), reference)
    assert victim.process.wait() == 0
    assert proxy.num_swallowed > swallowed


def test_an_api_that_never_hears_that_its_requests_were_queued_queues_each_once(
    wired: Wired, reference: Reference
) -> None:
    check_complete(wired.recorder.start(wired.cluster.api.url, ASKS[:1]).wait(), reference)
    wired.api_proxy.swallow_replies(script_marker("enqueue"), count=3)
    swallowed = wired.api_proxy.num_swallowed
    answers = wired.recorder.start(wired.cluster.api.url, ASKS).wait()
    assert wired.api_proxy.num_swallowed > swallowed
    check_partial(answers, reference)
    assert {answer.error_code for answer in answers} <= {None, "queue_unavailable"}


def test_an_api_that_never_hears_that_a_request_was_aborted_has_aborted_it(
    wired: Wired, reference: Reference
) -> None:
    cluster, ask = wired.cluster, Ask("tiny", "I leave", max_tokens=400)
    run = wired.recorder.start(cluster.api.url, ASKS)
    for num_swallowed in (0, 2):  # The server knows the script only after a first abort.
        wired.api_proxy.swallow_replies(script_marker("abort"), count=num_swallowed)
        with client_of(cluster.api.url, ask):
            request_id = wait_until(lambda: _id_of(cluster, "I leave"), what="the request")
        wait_until(lambda: not _id_of(cluster, "I leave"), what="the abort")
        assert cluster.connection.hget(f"rq:job:{request_id}", "status") == b"canceled"
    assert wired.api_proxy.num_swallowed
    check_complete(run.wait(), reference)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_worker_in_a_black_hole_for_two_leases_loses_its_requests_to_another(
    wired: Wired, reference: Reference, measure: Measure, direction: str
) -> None:
    run = wired.recorder.start(wired.cluster.api.url, LENGTHY)
    victim = pick_victim(wired.cluster.workers)
    (proxy,) = (proxy for proxy in wired.worker_proxies if proxy.url == victim.url)
    proxy.hold(up=direction != "down", down=direction != "up")
    held_at = time.monotonic()
    time.sleep(2 * LEASE_S)
    proxy.release()
    check_complete(run.wait(), reference)
    assert victim.is_running
    measure("longest pause", run.longest_pause_s(held_at), FAILOVER_LIMIT_S)


@pytest.mark.long
@pytest.mark.parametrize("direction", ["both", "up", "down"])
def test_an_api_in_a_black_hole_for_less_than_its_lease_loses_nothing(
    wired: Wired, reference: Reference, direction: str
) -> None:
    run = wired.recorder.start(wired.cluster.api.url, LENGTHY)
    wait_until(lambda: run.num_started == len(LENGTHY), 30, "all streams")
    wired.api_proxy.hold(up=direction != "down", down=direction != "up")
    time.sleep(API_LEASE_S / 3)
    wired.api_proxy.release()
    check_complete(run.wait(), reference)


def test_an_api_in_a_black_hole_for_two_of_its_leases_tells_each_client_one_clear_error(
    wired: Wired, reference: Reference
) -> None:
    run = wired.recorder.start(wired.cluster.api.url, LENGTHY)
    wait_until(lambda: run.num_started == len(LENGTHY), 30, "all streams")
    wired.api_proxy.hold()
    time.sleep(2 * API_LEASE_S)
    wired.api_proxy.release()
    check_partial(run.wait(), reference)
    check_complete(wired.recorder.start(wired.cluster.api.url, ASKS).wait(), reference)


def _id_of(cluster: Cluster, word: str) -> str | None:
    """The request with this word in its prompt, while it waits or runs."""
    for request_id in cluster.known_ids():
        if word.encode() in (cluster.connection.hget(f"rq:job:{request_id}", "request") or b""):
            return request_id
    return None
