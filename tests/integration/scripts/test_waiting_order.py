"""Tests of the index beside each queue: what a look finds, what a claim takes, how lists repair it."""

import random
from typing import Any

import pytest
import redis
from rq.job import Job
from rq.serializers import JSONSerializer

from shared.messages import RequestClass, decode_event
from shared.queue import keys
from shared.queue.order import Pick
from shared.queue.places import tenant_key
from shared.queue.records import Held
from shared.queue.slot_plan import AdapterSlots
from shared.queue.worker_streams import WorkerStreams
from tests.streams import (
    BASE,
    BlockingApi,
    choose,
    claim,
    claimer,
    last,
    make_request,
    reaper,
    running,
    token,
    worker_streams,
)

QUEUE = f"{BASE}-a"
LIST = f"rq:queue:{QUEUE}"


@pytest.fixture
def streams(connection: redis.Redis) -> WorkerStreams:
    return worker_streams(connection)


def claimed_ids(streams: WorkerStreams, num_requests: int = 8) -> list[str]:
    """The ids of one claim, in its order."""
    return [claimed.held.request_id for claimed in claim(streams, num_requests)]


def places(connection: redis.Redis, queue: str = QUEUE) -> list[str]:
    """The index of a queue, in its order."""
    return [place.decode() for place in connection.zrange(keys.order(queue), 0, -1)]


def as_before_the_index(connection: redis.Redis, request_id: str, queue: str = QUEUE) -> None:
    """Makes a waiting request one that an API of an earlier release has put on its queue."""
    job = Job.key_for(request_id)
    connection.zrem(keys.order(queue), connection.hget(job, "place") or b"")
    connection.hdel(job, "place", "order", "deadline_ms")
    if not connection.zcard(keys.order(queue)):
        connection.delete(keys.order(queue))


def taken_before_the_index(connection: redis.Redis, request_id: str) -> None:
    """Takes a waiting request as a worker of an earlier release does: off the list, but not off the index."""
    connection.lrem(LIST, 1, request_id)
    connection.hset(Job.key_for(request_id), "status", "started")
    connection.hset(keys.owner(request_id), "execution", "e")


def test_the_index_holds_what_waits_and_nothing_else(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams
) -> None:
    ids = [api.enqueue(make_request("a")) for _ in range(4)]
    assert [place.rpartition("|")[2] for place in places(connection)] == ids
    assert 0 < connection.ttl(keys.order(QUEUE)) <= 86400
    (first, second) = claim(streams, 2)
    api.abort(ids[2])
    assert [place.rpartition("|")[2] for place in places(connection)] == ids[3:]
    streams.hand_back([second.held])
    assert [place.rpartition("|")[2] for place in places(connection)] == [ids[1], ids[3]]
    streams.append([first.held], [last(first, 0)])
    claim(streams, 2)
    assert not connection.exists(keys.order(QUEUE))


def test_one_request_of_a_tenant_is_not_held_up_by_a_thousand_of_another_in_the_same_queue(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams
) -> None:
    for _ in range(30):
        api.enqueue(make_request("a", tenant="greedy"))
    modest = api.enqueue(make_request("a", tenant="modest"))
    assert modest in claimed_ids(streams, 2)


def test_the_oldest_request_of_a_queue_is_seen_among_any_number_of_tenants(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams
) -> None:
    first = api.enqueue(make_request("a", tenant="first"))
    for number in range(40):
        api.enqueue(make_request("a", tenant=f"tenant-{number}"))
    for _ in range(20):
        lines, _ = streams.look([QUEUE], [], num_queues=1, num_requests=1)
        assert tenant_key("first") in {line.places[0].tenant for line in lines}
        assert len(lines) <= 9
    assert claimed_ids(streams, 1) == [first]


def test_all_tenants_of_a_queue_are_seen_in_time(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams
) -> None:
    tenants = {f"tenant-{number}" for number in range(30)}
    for tenant in tenants:
        api.enqueue(make_request("a", tenant=tenant))
    seen: set[str] = set()
    for _ in range(100):
        seen |= {line.places[0].tenant for line in streams.look([QUEUE], [], num_queues=1, num_requests=1)[0]}
    assert seen == {tenant_key(tenant) for tenant in tenants}


def test_the_lower_priority_of_a_tenant_is_claimed_first(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams
) -> None:
    ids = {priority: api.enqueue(make_request("a", priority=priority)) for priority in (0, 7, -7)}
    assert claimed_ids(streams, 3) == [ids[-7], ids[0], ids[7]]


def test_what_ran_before_is_claimed_first_then_interactive_requests_then_batch(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams
) -> None:
    batch = api.enqueue(make_request("b", request_class=RequestClass.BATCH))
    (began,) = (api.enqueue(make_request("a")),)
    (claimed,) = claim(worker_streams(connection, "w2", served=[QUEUE]))
    interactive = api.enqueue(make_request("c"))
    reaper(connection, "w2").hand_back([claimed.held])
    assert claimed_ids(streams, 3) == [began, interactive, batch]


def test_queues_where_only_batch_waits_are_looked_at_last(connection: redis.Redis, api: BlockingApi) -> None:
    names = [f"x{number}" for number in range(40)]
    for name in names:
        api.enqueue(make_request(name, request_class=RequestClass.BATCH))
    late = api.enqueue(make_request("a"))
    streams = worker_streams(connection, served=[f"{BASE}-{name}" for name in (*names, "a")])
    lines, _ = streams.look([], [], num_queues=8, num_requests=1)
    assert lines[0].queue == QUEUE
    assert len(lines) == 8
    assert claimed_ids(streams, 1) == [late]
    api.enqueue(make_request("x39"))
    lines, _ = streams.look([], [], num_queues=1, num_requests=1)
    assert lines[0].queue == f"{BASE}-x39"


def test_a_resident_adapter_is_found_behind_any_number_of_older_heads_without_a_slot(
    connection: redis.Redis, api: BlockingApi
) -> None:
    names = [f"x{number}" for number in range(40)]
    for name in (*names, "a"):
        api.enqueue(make_request(name))
    streams = worker_streams(connection, served=[f"{BASE}-{name}" for name in (*names, "a")])
    claims = claimer(streams, slots=AdapterSlots(2, [QUEUE, f"{BASE}-b"]), max_wait_s=100)
    assert claims.claim(running(1, **{f"{BASE}-b": 1, f"{BASE}-c": 1})) == []
    (claimed,) = claims.claim(running(1, **{f"{BASE}-b": 1}))
    assert claimed.request.adapter_name == "a"


def test_a_look_shows_so_many_queues_however_many_wait(connection: redis.Redis, api: BlockingApi) -> None:
    names = [f"x{number}" for number in range(150)]
    for name in names:
        api.enqueue(make_request(name))
    streams = worker_streams(connection, served=[f"{BASE}-{name}" for name in names])
    lines, _ = streams.look([], [], num_queues=5, num_requests=4)
    assert [line.queue for line in lines[:3]] == [f"{BASE}-{name}" for name in names[:3]]
    assert len(lines) == 5


@pytest.mark.parametrize("are_named", [False, True])
def test_a_young_queue_is_seen_soon_among_many_with_older_heads(
    connection: redis.Redis, api: BlockingApi, are_named: bool
) -> None:
    names = [f"x{number}" for number in range(40)]
    for name in (*names, "a"):
        api.enqueue(make_request(name))
    served = [f"{BASE}-{name}" for name in (*names, "a")]
    streams = worker_streams(connection, served=served)
    seen = [
        {
            line.queue
            for line in streams.look([], served if are_named else [], num_queues=5, num_requests=1)[0]
        }
        for _ in range(300)
    ]
    assert sum(QUEUE in queues for queues in seen) > 3
    assert all(f"{BASE}-x0" in queues and len(queues) == 5 for queues in seen)


def test_a_worker_of_one_adapter_finds_it_behind_more_queues_of_others_than_one_look_reads(
    connection: redis.Redis, api: BlockingApi
) -> None:
    pipeline = connection.pipeline()
    for number in range(2500):
        pipeline.zadd(keys.waiting(BASE), {f"{BASE}-x{number}": number})
    pipeline.execute()
    mine = api.enqueue(make_request("a"))
    assert claimed_ids(worker_streams(connection, served=[QUEUE])) == [mine]


def test_a_claim_whose_picks_others_took_gets_what_is_left(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams
) -> None:
    ids = [api.enqueue(make_request("a")) for _ in range(2)]
    picks = choose(streams, 2)
    assert claimed_ids(worker_streams(connection, "w2"), 1) == ids[:1]
    (claimed,) = streams.claim(["e1", "e2"], picks)
    assert claimed.held.request_id == ids[1]
    claims = claimer(streams)
    assert streams.claim(["e3"], [Pick(QUEUE, "1|00000000|00000000|")]) == []
    assert claims.claim(running(1)) == []
    assert not claims.lost_race


def test_a_worker_that_was_outrun_says_so(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.enqueue(make_request("a"))
    claims, look = claimer(streams), streams.look

    def look_and_lose(*args: Any, **options: Any) -> Any:
        seen = look(*args, **options)
        assert len(claim(worker_streams(connection, "w2"))) == 1
        return seen

    with monkeypatch.context() as patch:
        patch.setattr(streams, "look", look_and_lose)
        assert claims.claim(running(1)) == []
    assert claims.lost_race
    assert claims.claim(running(1)) == []
    assert not claims.lost_race


# Earlier releases know the lists only.


def test_requests_of_an_earlier_api_are_found_between_those_of_this_one(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams
) -> None:
    ids = [api.enqueue(make_request("a")) for _ in range(9)]
    for request_id in (*ids[1:4], *ids[6:]):
        as_before_the_index(connection, request_id)
    assert claimed_ids(streams, 9) == ids


def test_a_queue_without_any_index_is_claimed_in_the_order_of_its_list(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams
) -> None:
    ids = [api.enqueue(make_request("a")) for _ in range(5)]
    for request_id in ids:
        as_before_the_index(connection, request_id)
    assert not connection.exists(keys.order(QUEUE))
    assert claimed_ids(streams, 2) + claimed_ids(streams, 3) == ids


def test_what_earlier_workers_took_is_dropped_from_the_index(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams
) -> None:
    ids = [api.enqueue(make_request("a")) for _ in range(4)]
    for request_id in ids[:2]:
        taken_before_the_index(connection, request_id)
    assert claimed_ids(streams) == ids[2:]
    assert not connection.exists(keys.order(QUEUE))


def test_a_request_without_a_place_is_found_though_list_and_index_are_equally_long(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams
) -> None:
    taken, unknown = api.enqueue(make_request("a")), api.enqueue(make_request("a"))
    as_before_the_index(connection, unknown)
    taken_before_the_index(connection, taken)
    assert connection.llen(LIST) == connection.zcard(keys.order(QUEUE)) == 1
    assert claimed_ids(streams) == [unknown]


def test_a_sweep_drops_the_places_of_requests_that_are_gone(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams
) -> None:
    ids = [api.enqueue(make_request("a", tenant=str(number))) for number in range(6)]
    for request_id in ids[:5]:
        taken_before_the_index(connection, request_id)
    streams.sweep([QUEUE])
    assert [place.rpartition("|")[2] for place in places(connection)] == ids[5:]


def test_a_request_that_an_earlier_worker_hands_back_counts_as_begun_by_its_log(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams
) -> None:
    began = api.enqueue(make_request("a"))
    other = api.enqueue(make_request("b"))
    (claimed,) = claim(worker_streams(connection, "w2", served=[QUEUE]))
    streams.append([claimed.held], [])
    worker_streams(connection, "w2").append([claimed.held], [token(claimed, 0)])
    worker_streams(connection, "w2").hand_back([claimed.held])
    as_before_the_index(connection, began)
    assert places(connection) == []
    assert claimed_ids(streams, 2) == [began, other]


@pytest.mark.parametrize("place", [b"nan", b"\xff\xfe", b"1|x|y|z", b"0"], ids=str)
def test_garbage_in_the_index_holds_nobody_up(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams, place: bytes
) -> None:
    ids = [api.enqueue(make_request("a", tenant=str(number))) for number in range(3)]
    connection.zadd(keys.order(QUEUE), {place: 1, b"%s-" % place: -1, places(connection)[0]: 7})
    streams.sweep([QUEUE])
    assert sorted(claimed_ids(streams)) == sorted(ids)


class EarlierRelease:
    """An API and a worker that know RQ's lists and `waiting`, and nothing of the index."""

    def __init__(self, connection: redis.Redis, api: BlockingApi) -> None:
        self._connection = connection
        self._api = api

    def enqueue(self, name: str) -> str:
        """At the back of the list."""
        request_id = self._api.enqueue(make_request(name))
        as_before_the_index(self._connection, request_id, f"{BASE}-{name}")
        return request_id

    def claim(self, name: str) -> str | None:
        """The head of the list."""
        head = self._connection.lindex(f"rq:queue:{BASE}-{name}", 0)
        if head is None:
            return None
        self._connection.lrem(f"rq:queue:{BASE}-{name}", 1, head)
        self._connection.hset(Job.key_for(head.decode()), "status", "started")
        self._connection.hset(keys.owner(head.decode()), "execution", "e")
        self._connection.zrem(keys.waiting(BASE), f"{BASE}-{name}")
        next_one = self._connection.lindex(f"rq:queue:{BASE}-{name}", 0)
        if next_one is not None:
            enqueued_ms = self._connection.hget(Job.key_for(next_one.decode()), "enqueued_ms")
            self._connection.zadd(keys.waiting(BASE), {f"{BASE}-{name}": float(enqueued_ms or 0)})
        return head.decode()

    def hand_back(self, request_id: str) -> None:
        """To the front of the list."""
        job = Job.key_for(request_id)
        queue, enqueued_ms = self._connection.hmget(job, "origin", "enqueued_ms")
        self._connection.delete(keys.owner(request_id))
        self._connection.hset(job, "status", "queued")
        self._connection.lpush(f"rq:queue:{(queue or b'').decode()}", request_id)
        self._connection.zadd(keys.waiting(BASE), {queue or b"": float(enqueued_ms or 0)})


@pytest.mark.parametrize("seed", range(6))
def test_two_releases_on_the_same_queues_lose_nothing_and_run_nothing_twice(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams, seed: int
) -> None:
    rng, earlier = random.Random(seed), EarlierRelease(connection, api)
    names = ("a", "b", "c")
    waiting: set[str] = set()
    held: list[Held] = []
    held_earlier: list[str] = []
    for _ in range(120):
        action = rng.randrange(6)
        if action == 0:
            waiting.add(api.enqueue(make_request(rng.choice(names), tenant=rng.choice("xyz"))))
        elif action == 1:
            waiting.add(earlier.enqueue(rng.choice(names)))
        elif action == 2:
            claimed = [entry.held for entry in claim(streams, 2)]
            assert {entry.request_id for entry in claimed} <= waiting
            waiting -= {entry.request_id for entry in claimed}
            held += claimed
        elif action == 3 and (taken := earlier.claim(rng.choice(names))):
            waiting.remove(taken)
            held_earlier.append(taken)
        elif action == 4 and held:
            returned = held.pop(rng.randrange(len(held)))
            assert streams.hand_back([returned]) == 1
            waiting.add(returned.request_id)
        elif action == 5 and held_earlier:
            back = held_earlier.pop(rng.randrange(len(held_earlier)))
            earlier.hand_back(back)
            waiting.add(back)
    while waiting:
        claimed = [entry.held for entry in claim(streams, 8)]
        assert claimed, f"stuck: {waiting}"
        assert {entry.request_id for entry in claimed} <= waiting
        waiting -= {entry.request_id for entry in claimed}
    streams.sweep([f"{BASE}-{name}" for name in names])
    assert not connection.keys(keys.order("*"))
    assert claim(streams) == []


# Deadlines.


def pass_deadline(connection: redis.Redis, request_id: str) -> None:
    assert connection.hexists(Job.key_for(request_id), "deadline_ms")
    connection.hset(Job.key_for(request_id), "deadline_ms", 1)


def check_timed_out(connection: redis.Redis, request_id: str) -> None:
    """Checks that the client got an error, and that the job failed and left its queue."""
    event = decode_event(connection.lindex(keys.log(request_id), -1))
    assert (event.error.code, event.finish_reason) == ("queue_timeout", "error")
    job = Job.fetch(request_id, connection, JSONSerializer)
    assert job.get_status() == "failed"
    assert "queue_timeout" in job.latest_result().exc_string
    assert request_id.encode() not in connection.lrange(LIST, 0, -1)
    assert connection.hget(Job.key_for(request_id), "request") == b""


def test_an_overdue_request_is_ended_and_not_begun(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams
) -> None:
    overdue, fresh = (api.enqueue(make_request("a", wait_limit_s=100)) for _ in range(2))
    pass_deadline(connection, overdue)
    assert claimed_ids(streams) == [fresh]
    check_timed_out(connection, overdue)


def test_an_overdue_request_is_ended_between_look_and_claim(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams
) -> None:
    overdue = api.enqueue(make_request("a", wait_limit_s=100))
    picks = choose(streams, 1)
    pass_deadline(connection, overdue)
    assert streams.claim(["e1"], picks) == []
    check_timed_out(connection, overdue)


def test_a_sweep_ends_overdue_requests_where_no_worker_has_room(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams
) -> None:
    ids = [api.enqueue(make_request("a", wait_limit_s=100)) for _ in range(3)]
    for request_id in ids[:2]:
        pass_deadline(connection, request_id)
    assert streams.sweep([QUEUE]) == 1
    for request_id in ids[:2]:
        check_timed_out(connection, request_id)
    assert claimed_ids(streams) == ids[2:]


def test_the_deadline_is_over_once_a_request_has_begun(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams
) -> None:
    request_id = api.enqueue(make_request("a", wait_limit_s=100))
    (claimed,) = claim(streams)
    streams.hand_back([claimed.held])
    assert not connection.hexists(Job.key_for(request_id), "deadline_ms")
    assert claimed_ids(streams) == [request_id]


def test_a_request_without_a_limit_has_no_deadline(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams
) -> None:
    request_id = api.enqueue(make_request("a"))
    assert not connection.hexists(Job.key_for(request_id), "deadline_ms")


def test_an_overdue_request_that_an_operator_requeues_fails_because_its_prompt_is_gone(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams
) -> None:
    request_id = api.enqueue(make_request("a", wait_limit_s=100))
    pass_deadline(connection, request_id)
    assert claimed_ids(streams) == []
    Job.fetch(request_id, connection, JSONSerializer).requeue()
    streams.sweep([QUEUE])
    assert claimed_ids(streams) == []
    assert "it has no request" in Job.fetch(request_id, connection, JSONSerializer).meta["unreadable"]
