"""Which adapters a worker with few slots claims for: resident ones first, and others within a bound."""

from collections import Counter
from uuid import uuid4

import pytest
import redis

from shared.queue import keys
from shared.queue.records import Claim, Slots
from shared.queue.worker_streams import WorkerStreams
from tests.redis_server import RedisServer
from tests.streams import BASE, BlockingApi, last, make_request, worker_streams

NAMES = tuple("abcdefghijklmnop")
MAX_WAIT_S = 10.0


class SlotWorker:
    """A worker's claims over a few slots. A turn is one second: the heads that wait get older by it."""

    def __init__(self, connection: redis.Redis, num_slots: int, max_num_requests: int) -> None:
        served = [BASE, *(queue(name) for name in NAMES)]
        self.streams: WorkerStreams = worker_streams(connection, served=served)
        self.max_num_requests = max_num_requests
        self.running: dict[str, tuple[Claim, int]] = {}
        self.resident: list[str] = []
        self.num_loads = 0
        self._connection = connection
        self._num_slots = num_slots

    def turn(self, num_steps: int = 1) -> list[str]:
        """Ends what has run for so many turns, then claims; the queues of what was claimed."""
        ended = [claim for claim, left in self.running.values() if left == 0]
        self.streams.append([claim.held for claim in ended], [last(claim, 0) for claim in ended])
        self.running = {id: (c, left - 1) for id, (c, left) in self.running.items() if left > 0}
        in_use = Counter(queue(claim.request.adapter_name) for claim, _ in self.running.values())
        room = self.max_num_requests - len(self.running)
        claims = self.streams.claim(
            [uuid4().hex for _ in range(room)],
            in_use,
            Slots(self._num_slots, self.resident, MAX_WAIT_S),
        )
        for claim in claims:
            self.running[claim.held.request_id] = claim, num_steps
            self._use_slot(queue(claim.request.adapter_name))
        adapters = {queue(claim.request.adapter_name) for claim, _ in self.running.values()} - {BASE}
        assert len(adapters) <= self._num_slots
        self._age_heads()
        return [queue(claim.request.adapter_name) for claim in claims]

    def _use_slot(self, name: str) -> None:
        if name == BASE:
            return
        if name in self.resident:
            self.resident.remove(name)
        else:
            self.num_loads += 1
            in_use = {queue(claim.request.adapter_name) for claim, _ in self.running.values()}
            if len(self.resident) == self._num_slots:
                self.resident.remove(next(other for other in self.resident if other not in in_use))
        self.resident.append(name)

    def _age_heads(self) -> None:
        for name in self._connection.zrange(keys.waiting(BASE), 0, -1):
            self._connection.zincrby(keys.waiting(BASE), -1000, name)
            head = self._connection.lindex(f"rq:queue:{name.decode()}", 0)
            self._connection.hincrby(f"rq:job:{head.decode()}", "enqueued_ms", -1000)


def queue(adapter_name: str | None) -> str:
    return f"{BASE}-{adapter_name}" if adapter_name else BASE


@pytest.fixture
def api(redis_server: RedisServer, connection: redis.Redis) -> BlockingApi:
    return BlockingApi(redis_server.url)


def test_no_more_adapters_run_than_there_are_slots_and_the_base_needs_none(
    connection: redis.Redis, api: BlockingApi
) -> None:
    for name in ("a", "b", "c", None):
        api.enqueue(make_request(name))
    assert SlotWorker(connection, 2, 8).turn() == ["tiny-a", "tiny-b", BASE]


def test_a_resident_adapter_comes_before_one_that_would_push_it_out(
    connection: redis.Redis, api: BlockingApi
) -> None:
    worker = SlotWorker(connection, 1, 1)
    worker.resident = ["tiny-a"]
    api.enqueue(make_request("b"))
    api.enqueue(make_request("a"))
    assert worker.turn(0) == ["tiny-a"]
    assert worker.turn(0) == ["tiny-b"]


def test_an_empty_slot_is_taken_at_once(connection: redis.Redis, api: BlockingApi) -> None:
    worker = SlotWorker(connection, 2, 2)
    worker.resident = ["tiny-a"]
    for name in ("a", "a", "b"):
        api.enqueue(make_request(name))
    assert worker.turn() == ["tiny-a", "tiny-b"]


def test_a_head_that_waited_long_enough_gets_a_slot_when_the_longest_run_of_another_is_over(
    connection: redis.Redis, api: BlockingApi
) -> None:
    longest_run = 4
    worker = SlotWorker(connection, 2, 8)
    for name in ("a", "b", "a"):
        api.enqueue(make_request(name))
    worker.turn(longest_run)
    api.enqueue(make_request("c"))
    for turn in range(40):
        api.enqueue(make_request("a"))
        api.enqueue(make_request("b"))
        if "tiny-c" in worker.turn(longest_run):
            assert MAX_WAIT_S <= turn <= MAX_WAIT_S + longest_run + 2
            return
    pytest.fail("the third adapter starved")


def test_twice_as_many_adapters_as_slots_do_not_push_each_other_out_all_the_time(
    connection: redis.Redis, api: BlockingApi
) -> None:
    worker = SlotWorker(connection, 8, 16)
    served: Counter[str] = Counter()
    last_turn: dict[str, int] = {}
    for name in NAMES:
        api.enqueue(make_request(name))
        api.enqueue(make_request(name))
    for turn in range(60):
        for name in worker.turn(1):
            served[name] += 1
            assert turn - last_turn.get(name, 0) <= 2 * MAX_WAIT_S + 4
            last_turn[name] = turn
            api.enqueue(make_request(name.removeprefix("tiny-")))
    assert len(served) == 16
    assert worker.num_loads < served.total() / 4


def test_a_resident_adapter_is_found_behind_any_number_of_older_heads_without_a_slot(
    connection: redis.Redis, api: BlockingApi
) -> None:
    names = [f"x{i}" for i in range(40)]
    for name in (*names, "a"):
        api.enqueue(make_request(name))
    served = [queue(name) for name in (*names, "a")]
    running = {"tiny-b": 1, "tiny-c": 1}
    slots = Slots(2, ["tiny-a", "tiny-b"], MAX_WAIT_S)
    streams = worker_streams(connection, served=served)
    assert streams.claim(["e1"], running, slots) == []
    del running["tiny-c"]
    (claimed,) = streams.claim(["e2"], running, slots)
    assert claimed.request.adapter_name == "a"


def age(connection: redis.Redis, request_id: str, seconds: float) -> None:
    """Lets a queued request have waited for so long."""
    seconds_now, microseconds = connection.time()
    enqueued_ms = int(seconds_now * 1000 + microseconds / 1000 - seconds * 1000)
    connection.hset(f"rq:job:{request_id}", "enqueued_ms", enqueued_ms)
    name = (connection.hget(f"rq:job:{request_id}", "origin") or b"").decode()
    if connection.lindex(f"rq:queue:{name}", 0) == request_id.encode():
        connection.zadd(keys.waiting(BASE), {name: enqueued_ms})


def test_an_adapter_that_a_claim_pushes_out_is_not_resident_for_the_rest_of_it(
    connection: redis.Redis, api: BlockingApi
) -> None:
    for name, waited_s in (("c", MAX_WAIT_S + 1), ("a", 3), ("b", 2)):
        age(connection, api.enqueue(make_request(name)), waited_s)
    worker = SlotWorker(connection, 2, 2)
    worker.resident = ["tiny-a", "tiny-b"]
    assert worker.turn() == ["tiny-c", "tiny-b"]


def test_an_adapter_that_one_on_its_way_pushes_out_is_not_resident(
    connection: redis.Redis, api: BlockingApi
) -> None:
    for name, waited_s in (("a", 3), ("b", 2)):
        age(connection, api.enqueue(make_request(name)), waited_s)
    slots = Slots(2, ["tiny-a", "tiny-b"], MAX_WAIT_S)
    streams = worker_streams(connection, served=["tiny-a", "tiny-b"])
    (claimed,) = streams.claim(["e1"], {"tiny-c": 1}, slots)
    assert claimed.request.adapter_name == "b"


def test_within_one_claim_too_the_head_that_waits_longest_comes_first(
    connection: redis.Redis, api: BlockingApi
) -> None:
    for name, waited_s in (("a", 9), ("b", 8), ("b", 7), ("a", 1)):
        age(connection, api.enqueue(make_request(name)), waited_s)
    assert SlotWorker(connection, 2, 4).turn() == ["tiny-a", "tiny-b", "tiny-b", "tiny-a"]


def test_the_request_behind_an_overdue_one_is_not_overdue(connection: redis.Redis, api: BlockingApi) -> None:
    ids = [api.enqueue(make_request(name)) for name in ("b", "b", "a")]
    for request_id, waited_s in zip(ids, (MAX_WAIT_S + 1, 1, 2), strict=True):
        age(connection, request_id, waited_s)
    connection.hdel(f"rq:job:{ids[0]}", "request")  # none of ours: rejected
    worker = SlotWorker(connection, 1, 1)
    worker.resident = ["tiny-a"]
    assert worker.turn() == ["tiny-a"]


def test_what_was_closed_before_the_last_wait_was_over_is_not_preferred_when_another_begins(
    connection: redis.Redis, api: BlockingApi
) -> None:
    served = [queue(name) for name in ("a", "b", "c")]
    streams, slots = worker_streams(connection, served=served), Slots(2, ["tiny-a", "tiny-b"], MAX_WAIT_S)

    def claim_beside_an_overdue_head(running: dict[str, int]) -> list[str]:
        age(connection, api.enqueue(make_request("c")), MAX_WAIT_S + 1)
        for name in ("a", "b"):
            api.enqueue(make_request(name))
        claims = streams.claim([uuid4().hex for _ in range(3)], running, slots)
        return [queue(claim.request.adapter_name) for claim in claims]

    assert claim_beside_an_overdue_head({"tiny-a": 1, "tiny-b": 2}) == ["tiny-b"]
    for name in served:
        connection.delete(f"rq:queue:{name}")
    streams.sweep(served)
    streams.append([], [])
    assert claim_beside_an_overdue_head({"tiny-a": 2, "tiny-b": 1}) == ["tiny-a"]
