"""Tests of the limits on a look: it takes bounded time, however many requests can't run or are gone."""

from collections.abc import Sequence

import pytest
import redis
from rq.job import Job

from shared.queue import keys
from shared.queue.places import tenant_key
from shared.queue.worker_streams import WorkerStreams
from tests.streams import BASE, QUEUES, BlockingApi, claimer, make_request, running, worker_streams

QUEUE = f"{BASE}-a"
MAX_PASSES = 128
MAX_REMOVED = 500
MAX_MENDED = 1000


@pytest.fixture
def streams(connection: redis.Redis) -> WorkerStreams:
    return worker_streams(connection)


def put_places(
    connection: redis.Redis, queue: str, tenants: Sequence[str], number: int, **job: str | int
) -> None:
    """Puts `number` places per tenant into the index of a queue; with fields of a job, requests that wait."""
    pipeline = connection.pipeline(transaction=False)
    for tenant in tenants:
        for position in range(number):
            request_id = f"{queue}-{tenant}-{position}"
            place = f"1|00000000|{tenant_key(tenant)}|2147483648|{position:016}|000001|{request_id}"
            pipeline.zadd(keys.order(queue), {place: 0})
            if job:
                fields = {"status": "queued", "place": place, "request": "{}", "base": BASE, "origin": queue}
                pipeline.hset(Job.key_for(request_id), mapping=fields | job)
                pipeline.rpush(f"rq:queue:{queue}", request_id)
    pipeline.zadd(keys.waiting(BASE), {queue: 1})
    pipeline.execute()


def calls(connection: redis.Redis, command: str) -> int:
    """The number of calls of a command since the last reset, those in scripts included."""
    return connection.info("commandstats").get(f"cmdstat_{command}", {"calls": 0})["calls"]


@pytest.mark.parametrize("job", [{"bytes": 50_000}, {"schema_version": 999}], ids=["long", "newer schema"])
def test_a_look_reads_so_many_requests_that_cannot_run_and_still_finds_one_that_can(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams, job: dict[str, int]
) -> None:
    for queue in QUEUES[:5]:
        put_places(connection, queue, "abcd", 60, **job)
    api.enqueue(make_request("not-loaded"), total_depth=10_000)
    found: set[str] = set()
    for _ in range(40):
        connection.config_resetstat()
        lines, _ = streams.look([QUEUE], [], num_queues=8, num_requests=8, num_long=0)
        assert calls(connection, "hmget") < 3 * MAX_PASSES + 40
        assert not streams.is_look_cut
        found |= {line.queue for line in lines}
    assert found == {QUEUES[5]}


def test_thousands_of_places_without_a_request_are_removed_by_several_looks(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams
) -> None:
    put_places(connection, QUEUE, "a", 2400)
    mine = api.enqueue(make_request("a", tenant="a"))
    claims = claimer(streams)
    num_claims = 0
    while not (claimed := claims.claim(running(1))):
        assert claims.lost_race, "the worker must not wait for the doorbell"
        num_claims += 1
        assert connection.zcard(keys.order(QUEUE)) == 2401 - num_claims * MAX_REMOVED
    assert num_claims == 4
    assert [claim.held.request_id for claim in claimed] == [mine]
    assert not claims.lost_race


@pytest.mark.parametrize("is_named", [False, True])
def test_places_without_a_request_hide_no_other_queue_for_long(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams, is_named: bool
) -> None:
    put_places(connection, QUEUE, "abc", 500)
    mine = api.enqueue(make_request("b"))
    claims = claimer(streams, served=[QUEUE, f"{BASE}-b"] if is_named else ())
    for _ in range(6):
        if claimed := claims.claim(running(1)):
            break
    assert [claim.held.request_id for claim in claimed] == [mine]


def test_a_look_ends_so_many_overdue_requests_and_the_next_one_the_rest(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams
) -> None:
    put_places(connection, QUEUE, "a", 110, deadline_ms=1)
    assert claimer(streams).claim(running(1)) == []
    assert streams.is_look_cut
    assert connection.llen(f"rq:queue:{QUEUE}") == 10
    assert claimer(streams).claim(running(1)) == []
    assert not streams.is_look_cut
    assert not connection.exists(f"rq:queue:{QUEUE}", keys.order(QUEUE))


def test_a_claim_takes_bounded_time_if_the_list_has_lost_the_requests_of_an_index(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams
) -> None:
    put_places(connection, QUEUE, "a", 600, bytes=1)
    connection.ltrim(f"rq:queue:{QUEUE}", -1, -1)
    claims = claimer(streams)
    assert claims.claim(running(1)) == []
    assert claims.lost_race
    assert connection.zcard(keys.order(QUEUE)) == 100


@pytest.mark.parametrize("end", ["front", "back"])
def test_thousands_of_dead_requests_at_an_end_of_a_list_are_removed_by_several_calls(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams, end: str
) -> None:
    mine = api.enqueue(make_request("a"))
    dead = [f"dead-{number}" for number in range(5000)]
    (connection.lpush if end == "front" else connection.rpush)(f"rq:queue:{QUEUE}", *dead)
    num_calls = 0
    while (num_left := connection.llen(f"rq:queue:{QUEUE}")) > 1:
        streams.sweep([QUEUE])
        num_calls += 1
        assert num_left - connection.llen(f"rq:queue:{QUEUE}") <= 2 * MAX_MENDED + MAX_REMOVED
        assert connection.zscore(keys.waiting(BASE), QUEUE) is not None
    assert num_calls > 1
    assert [claim.held.request_id for claim in claimer(streams).claim(running(1))] == [mine]


def test_a_call_that_finds_only_dead_requests_leaves_the_rest_to_the_next(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams
) -> None:
    request_id = api.enqueue(make_request("a"))
    connection.rpush(f"rq:queue:{QUEUE}", *(f"dead-{number}" for number in range(3 * MAX_REMOVED)))
    api.abort(request_id)
    assert connection.llen(f"rq:queue:{QUEUE}") == 2 * MAX_REMOVED
    while connection.zscore(keys.waiting(BASE), QUEUE) is not None:
        num_left = connection.llen(f"rq:queue:{QUEUE}")
        assert claimer(streams).claim(running(1)) == []
        assert connection.llen(f"rq:queue:{QUEUE}") < num_left
    assert not connection.exists(f"rq:queue:{QUEUE}", keys.order(QUEUE))


@pytest.mark.parametrize("score", [-1, 1])
def test_thousands_of_foreign_entries_in_an_index_are_removed_by_several_sweeps(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams, score: int
) -> None:
    mine = api.enqueue(make_request("a"))
    connection.zadd(keys.order(QUEUE), {f"foreign-{number}": score for number in range(3 * MAX_REMOVED)})
    while (num_left := connection.zcard(keys.order(QUEUE))) > 1:
        streams.sweep([QUEUE])
        assert 0 < num_left - connection.zcard(keys.order(QUEUE)) <= MAX_REMOVED + 100
    assert [claim.held.request_id for claim in claimer(streams).claim(running(1))] == [mine]
