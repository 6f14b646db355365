"""Records in Redis that can't be read: each costs one request at most, whoever meets it first."""

from collections.abc import Callable
from typing import Any

import pytest
import redis
from rq import Worker
from rq.job import Job

from shared.messages import decode_event
from shared.queue import keys
from shared.queue.records import Claim
from shared.queue.worker_streams import WorkerStreams
from tests.streams import (
    BASE,
    QUEUES,
    BlockingApi,
    claim,
    last,
    make_request,
    token,
    worker_streams,
)

RUNNING = ("chatcmpl-running-0", "chatcmpl-running-1")
HANDED_BACK, ABORTED = "chatcmpl-handed-back", "chatcmpl-aborted"
WAITING = ("chatcmpl-waiting-0", "chatcmpl-waiting-1")
ENDED, ELSEWHERE = "chatcmpl-ended", "chatcmpl-elsewhere"
ON_BASE = (*RUNNING, HANDED_BACK, *WAITING, ABORTED)
RIGHT_ENDS = {ABORTED: "canceled"}
"""The end of requests that don't finish."""
TYPES: dict[str, Callable[[redis.Redis, str], object]] = {
    "string": lambda connection, key: connection.set(key, "garbage"),
    "list": lambda connection, key: connection.rpush(key, "garbage"),
    "hash": lambda connection, key: connection.hset(key, "garbage", "garbage"),
    "set": lambda connection, key: connection.sadd(key, "garbage"),
    "zset": lambda connection, key: connection.zadd(key, {"garbage": 1}),
    "stream": lambda connection, key: connection.xadd(key, {"garbage": "garbage"}),
}
GARBAGE = ("nan", b"\xff\xfe")
MORE_GARBAGE = ("", "abc", "-1", "1e400", '{"a":', "[" * 5000, "{}")


class World:
    """A small deployment in the middle of its work: requests that ran, run and wait, on two queues."""

    def __init__(self, connection: redis.Redis, api: BlockingApi) -> None:
        self.connection = connection
        self.api = api
        self.worker: WorkerStreams = worker_streams(connection, "w1")
        self.claims: list[Claim] = []

    def build(self) -> "World":
        """Fills an empty server."""
        Worker(["default"], name="w1", connection=self.connection).register_birth()
        for request_id in (ENDED, *ON_BASE):
            self.api.enqueue(make_request(request_id=request_id))
        self.api.enqueue(make_request("a", request_id=ELSEWHERE))
        self.worker.renew([])
        (ended,) = claim(self.worker)
        self.worker.append([ended.held], [last(ended, 0)])
        self.claims = claim(self.worker, 3, running={f"{BASE}-a": 3})
        self.worker.append([c.held for c in self.claims], [token(c, 0) for c in self.claims])
        return self

    def save(self) -> dict[bytes, bytes]:
        """All that the server holds."""
        return {key: bytes(self.connection.dump(key) or b"") for key in self.connection.scan_iter("*")}

    def load(self, saved: dict[bytes, bytes]) -> None:
        """Puts the server back to where it was."""
        pipeline = self.connection.pipeline()
        pipeline.flushall()
        for key, value in saved.items():
            pipeline.restore(key, 0, value)
        pipeline.execute()

    def go_on(self) -> None:
        """The worker goes on and loses its requests; another one takes all that it can and ends it."""
        held = [c.held for c in self.claims]
        self.api.abort(ABORTED)
        self.worker.append(held, [token(c, 1) for c in self.claims])
        self.worker.renew(held, abort_unread=True)
        self.worker.hand_back(held[2:])
        other = worker_streams(self.connection, "w2")
        for _ in range(3):
            other.renew([])
            other.sweep(QUEUES)
            other.end_unserved(min_pause_s=0.001)
            for request_id in (*RUNNING, HANDED_BACK):
                if self.connection.zscore(keys.leases(BASE), request_id) is not None:
                    self.connection.zadd(keys.leases(BASE), {request_id: 0})
            other.reap()
            for claimed in claim(other, 4):
                other.append([claimed.held], [last(claimed, len(claimed.events))])
        other.sweep(QUEUES)

    def ends(self) -> dict[str, str]:
        """The state of each request that had not ended."""
        return {request_id: self._end_of(request_id) for request_id in (*ON_BASE, ELSEWHERE)}

    def is_told(self, request_id: str) -> bool:
        """True if the client of a request that did not finish learns of it, by the log or by its job."""
        log = self.connection.lrange(keys.log(request_id), -1, -1)
        if log and decode_event(log[0]).error is not None:
            return True
        job = Job.key_for(request_id)
        return self.connection.type(job) != b"hash" or bool(self.connection.hexists(job, "unreadable"))

    def _end_of(self, request_id: str) -> str:
        if self.connection.type(Job.key_for(request_id)) != b"hash":
            return "dropped"
        return (self.connection.hget(Job.key_for(request_id), "status") or b"no status").decode()


def connection_remains(connection: redis.Redis) -> list[str]:
    """Entries of requests that run, when none does."""
    patterns = ("rq:wip:*", keys.owner("*"), keys.leases("*"))
    return [key.decode() for pattern in patterns for key in connection.scan_iter(pattern)]


def check(world: World, name: str, what: str) -> None:
    """After one record was broken: everything goes on, and at most one request, its own, did not finish."""
    try:
        world.go_on()
    except redis.RedisError as error:
        raise AssertionError(f"{what}: {error}") from error
    ends = world.ends()
    harmed = {request_id for request_id, end in ends.items() if end != RIGHT_ENDS.get(request_id, "finished")}
    if name.startswith("rq:queue:"):
        # Which requests wait in a queue stands there alone; none of those that ran is harmed.
        harmed -= {*WAITING, ABORTED} if name == f"rq:queue:{BASE}" else {ELSEWHERE}
    own = {request_id for request_id in ends if request_id in name}
    remains = {*connection_remains(world.connection)} - {name, name.replace("rq:", "lorelay:unreadable:rq:")}
    assert not remains, f"{what}: left {remains}"
    assert harmed <= own, f"{what}: {ends}"
    for request_id in harmed:
        assert ends[request_id] in ("failed", "dropped"), f"{what}: {ends}"
        assert world.is_told(request_id), f"{what}: the client hears nothing"


def test_a_key_of_another_type_costs_its_own_request_at_most(
    connection: redis.Redis, api: BlockingApi
) -> None:
    world = World(connection, api).build()
    saved = world.save()
    assert len(saved) > 25
    for key in sorted(saved):
        kind = connection.type(key).decode()
        for other in TYPES.keys() - {kind}:
            world.load(saved)
            connection.delete(key)
            TYPES[other](connection, key.decode())
            check(world, key.decode(), f"{key.decode()} as a {other}")


def test_a_key_that_is_deleted_costs_its_own_request_at_most(
    connection: redis.Redis, api: BlockingApi
) -> None:
    world = World(connection, api).build()
    saved = world.save()
    for key in sorted(saved):
        world.load(saved)
        connection.delete(key)
        check(world, key.decode(), f"{key.decode()} deleted")


@pytest.mark.parametrize(
    "values", [GARBAGE, pytest.param(MORE_GARBAGE, marks=pytest.mark.long)], ids=["some", "more"]
)
def test_a_value_that_is_garbage_costs_its_own_request_at_most(
    connection: redis.Redis, api: BlockingApi, values: tuple[str | bytes, ...]
) -> None:
    world = World(connection, api).build()
    saved = world.save()
    for key in sorted(saved):
        world.load(saved)
        for place in places(connection, key):
            for value in values:
                world.load(saved)
                break_value(connection, key, place, value)
                check(world, key.decode(), f"{key.decode()} at {place!r} as {value!r:.20}")


def places(connection: redis.Redis, key: bytes) -> list[Any]:
    """The fields of a hash, the indices of a list; one place in anything else."""
    kind = connection.type(key)
    if kind == b"hash":
        return sorted(connection.hkeys(key))
    return list(range(connection.llen(key))) if kind == b"list" else [None]


def break_value(connection: redis.Redis, key: bytes, place: Any, value: str | bytes) -> None:
    """Puts `value` in this place of a key, whose type stays; into a set as one more member."""
    put: dict[bytes, Callable[[], object]] = {
        b"hash": lambda: connection.hset(key, place, value),
        b"list": lambda: connection.lset(key, place, value),
        b"string": lambda: connection.set(key, value),
        b"set": lambda: connection.sadd(key, value),
        b"zset": lambda: connection.zadd(key, {value: 1}),
        b"stream": lambda: connection.xadd(key, {"garbage": value}),
    }
    put[connection.type(key)]()
