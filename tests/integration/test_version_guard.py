"""A request is answered by the weights that it was accepted for, or by none."""

import pytest
import redis
from rq.job import Job

from shared.errors import RegistryConflict
from shared.messages import decode_event
from shared.model_cards import ModelCard
from shared.queue import keys, registry
from shared.queue.slot_plan import AdapterSlots
from shared.queue.worker_streams import WorkerStreams
from tests.redis_server import RedisServer
from tests.streams import (
    BASE,
    BlockingApi,
    claim,
    claimer,
    make_request,
    reaper,
    running,
    token,
    worker_streams,
)

QUEUE = f"{BASE}-a"
OLD, NEW = "m1+a1", "m1+a2"


@pytest.fixture
def api(redis_server: RedisServer, connection: redis.Redis) -> BlockingApi:
    return BlockingApi(redis_server.url)


def enqueue(api: BlockingApi, version: str = OLD, name: str = "a") -> str:
    """A request that was accepted for these weights."""
    base_version, adapter_version = version.split("+")
    return api.enqueue(
        make_request(name, base_version=base_version, adapter_version=adapter_version, detached=True)
    )


def serving(connection: redis.Redis, name: str, version: str, **options: object) -> WorkerStreams:
    """A live worker that has these weights of the adapter."""
    streams = worker_streams(connection, name, served={BASE: "m1", QUEUE: version}, **options)
    streams.renew([])
    return streams


def register(connection: redis.Redis, version: str) -> None:
    """Makes these the weights that the registry names."""
    base_version, adapter_version = version.split("+")
    card = ModelCard("a", BASE, "/a", adapter_version, 1, 64, "a", base_version)
    connection.hset(keys.MODELS, "a", card.encode())


def lapse(connection: redis.Redis, name: str) -> None:
    """Makes the leases of a worker and of all running requests expire."""
    connection.zadd(keys.workers(BASE), {name: 1})
    for request_id in connection.zrange(keys.leases(BASE), 0, -1):
        connection.zadd(keys.leases(BASE), {request_id: 1})


def judge(connection: redis.Redis, streams: WorkerStreams) -> list[str]:
    """One turn of a worker, however short the time since the last one."""
    connection.delete(keys.judged(BASE))
    return streams.end_unserved(min_pause_s=60)


def claimed_ids(streams: WorkerStreams, num_requests: int = 8) -> list[str]:
    return [claimed.held.request_id for claimed in claim(streams, num_requests)]


def error_code(connection: redis.Redis, request_id: str) -> str:
    """The error that its client is told."""
    return decode_event(connection.lindex(keys.log(request_id), -1)).error.code


def test_a_claim_passes_over_requests_for_other_weights_and_takes_those_behind_them(
    connection: redis.Redis, api: BlockingApi
) -> None:
    old = [enqueue(api, OLD) for _ in range(3)]
    new = [enqueue(api, NEW) for _ in range(3)]
    old.append(enqueue(api, OLD))
    assert claimed_ids(serving(connection, "new", NEW)) == new
    assert [entry.decode() for entry in connection.lrange(f"rq:queue:{QUEUE}", 0, -1)] == old
    assert claimed_ids(serving(connection, "old", OLD)) == old


def test_a_request_passed_over_by_one_worker_keeps_its_place_for_another(
    connection: redis.Redis, api: BlockingApi
) -> None:
    first, second = enqueue(api, OLD), enqueue(api, NEW)
    assert claimed_ids(serving(connection, "new", NEW), 1) == [second]
    assert connection.zscore(keys.waiting(BASE), QUEUE) is not None
    assert claimed_ids(serving(connection, "old", OLD), 1) == [first]


def test_forty_queues_of_other_weights_do_not_hold_up_the_one_behind_them(
    connection: redis.Redis, api: BlockingApi
) -> None:
    names = [f"x{number}" for number in range(40)]
    for name in names:
        enqueue(api, OLD, name)
    mine = enqueue(api, NEW, "a")
    served = {f"{BASE}-{name}": NEW for name in (*names, "a")}
    assert claimed_ids(worker_streams(connection, served=served)) == [mine]


def test_a_request_that_waits_for_other_weights_closes_no_slot(
    connection: redis.Redis, api: BlockingApi
) -> None:
    enqueue(api, OLD, "a")
    late = enqueue(api, NEW, "b")
    streams = worker_streams(connection, served={QUEUE: NEW, f"{BASE}-b": NEW})
    # Overdue at once, and the only slot is in use by b.
    slots = AdapterSlots(1, [f"{BASE}-b"])
    claims = claimer(streams, slots=slots, max_wait_s=0.0).claim(running(1, **{f"{BASE}-b": 1}))
    assert [claimed.held.request_id for claimed in claims] == [late]


def test_a_request_of_an_earlier_release_is_claimed_by_any_worker(
    connection: redis.Redis, api: BlockingApi
) -> None:
    request_id = api.enqueue(make_request("a", adapter_version="a1"))
    assert claimed_ids(serving(connection, "new", NEW)) == [request_id]


def test_a_base_of_another_version_is_passed_over_like_an_adapter(
    connection: redis.Redis, api: BlockingApi
) -> None:
    api.enqueue(make_request(base_version="m0"))
    mine = api.enqueue(make_request(base_version="m1"))
    assert claimed_ids(serving(connection, "new", NEW)) == [mine]


@pytest.mark.parametrize("registered", [NEW, None], ids=["replaced", "removed"])
def test_requests_for_weights_that_no_live_worker_has_end_with_an_error_of_their_own(
    connection: redis.Redis, api: BlockingApi, registered: str | None
) -> None:
    if registered:
        register(connection, registered)
    gone, served = enqueue(api, OLD), enqueue(api, NEW)
    streams = serving(connection, "new", NEW)
    assert judge(connection, streams) == [gone]
    assert error_code(connection, gone) == "adapter_version_gone"
    assert connection.hmget(Job.key_for(gone), "status", "request") == [b"failed", b""]
    assert claimed_ids(streams) == [served]


def test_requests_for_weights_that_a_live_worker_has_wait_for_it(
    connection: redis.Redis, api: BlockingApi
) -> None:
    register(connection, NEW)
    waits = enqueue(api, OLD)
    old, new = serving(connection, "old", OLD), serving(connection, "new", NEW)
    assert judge(connection, new) == []
    assert claimed_ids(old) == [waits]


def test_a_worker_that_drains_or_lost_its_lease_counts_no_more(
    connection: redis.Redis, api: BlockingApi
) -> None:
    register(connection, NEW)
    drained = serving(connection, "drained", OLD)
    serving(connection, "killed", OLD)
    new = serving(connection, "new", NEW)
    request_id = enqueue(api, OLD)
    assert judge(connection, new) == []
    drained.serve({})
    drained.renew([])
    lapse(connection, "killed")
    assert judge(connection, new) == [request_id]


def test_requests_of_the_registered_version_wait_for_a_worker_while_there_is_none(
    connection: redis.Redis, api: BlockingApi
) -> None:
    register(connection, OLD)
    waits = enqueue(api, OLD)
    base_only = worker_streams(connection, "base", served={BASE: "m1"})
    base_only.renew([])
    assert judge(connection, base_only) == []
    assert claimed_ids(serving(connection, "old", OLD)) == [waits]


def test_a_request_whose_only_worker_died_in_the_middle_ends_after_the_text_it_has(
    connection: redis.Redis, api: BlockingApi
) -> None:
    register(connection, NEW)
    request_id = enqueue(api, OLD)
    old = serving(connection, "old", OLD)
    (claimed,) = claim(old)
    old.append([claimed.held], [token(claimed, 0, "so far")])
    lapse(connection, "old")
    new = serving(connection, "new", NEW)
    assert new.reap().requeued == [request_id]
    assert judge(connection, new) == [request_id]
    events = [decode_event(entry) for entry in connection.lrange(keys.log(request_id), 0, -1)]
    assert [event.event_no for event in events] == [0, 1]
    assert (events[0].text, events[1].error.code) == ("so far", "adapter_version_gone")


def test_nobody_judges_beside_a_worker_of_an_earlier_release(
    connection: redis.Redis, api: BlockingApi
) -> None:
    enqueue(api, OLD)
    new = serving(connection, "new", NEW)
    connection.zadd(keys.workers(BASE), {"earlier": 1e13, "no worker at all": 1e13})
    connection.hset("rq:worker:earlier", "state", "busy")
    assert judge(connection, new) == []
    connection.delete("rq:worker:earlier")
    assert len(judge(connection, new)) == 1


def test_a_worker_whose_own_lease_ran_out_does_not_judge(connection: redis.Redis, api: BlockingApi) -> None:
    enqueue(api, OLD)
    late = serving(connection, "late", NEW, lease_s=-1)
    assert judge(connection, late) == []


def test_all_workers_together_judge_once_in_a_while(connection: redis.Redis, api: BlockingApi) -> None:
    register(connection, NEW)
    one, other = serving(connection, "one", NEW), serving(connection, "other", NEW)
    assert one.end_unserved(min_pause_s=60) == []
    enqueue(api, OLD)
    assert other.end_unserved(min_pause_s=60) == []
    assert len(judge(connection, other)) == 1


def test_thousands_that_wait_are_judged_in_parts(connection: redis.Redis, api: BlockingApi) -> None:
    register(connection, NEW)
    first = enqueue(api, OLD)
    job = connection.dump(Job.key_for(first)) or b""
    others = [f"chatcmpl-copy-{number}" for number in range(2500)]
    pipeline = connection.pipeline()
    for number, request_id in enumerate(others):
        queue = f"{BASE}-b{number % 50}"
        pipeline.restore(Job.key_for(request_id), 0, job)
        pipeline.rpush(f"rq:queue:{queue}", request_id)
        pipeline.zadd(keys.waiting(BASE), {queue: number})
    pipeline.execute()
    assert sorted(judge(connection, serving(connection, "new", NEW))) == sorted([first, *others])
    assert connection.zcard(keys.waiting(BASE)) == 0


def test_reaped_requests_of_other_weights_go_to_a_worker_that_has_them(
    connection: redis.Redis, api: BlockingApi
) -> None:
    request_id = enqueue(api, OLD)
    claim(serving(connection, "dead", OLD))
    lapse(connection, "dead")
    assert reaper(connection).reap().requeued == [request_id]
    assert claimed_ids(serving(connection, "new", NEW)) == []
    assert claimed_ids(serving(connection, "old", OLD)) == [request_id]


def test_an_adapter_is_registered_with_the_base_that_it_was_checked_with(connection: redis.Redis) -> None:
    card = ModelCard("a", BASE, "/a", "a1", 1, 64, "a", "m1")
    registry.register(connection, [card])
    with pytest.raises(RegistryConflict, match=r"in version m1.*in version m2"):
        registry.register(connection, [ModelCard("a", BASE, "/a", "a1", 1, 64, "a", "m2")])
    registry.register(connection, [ModelCard("a", BASE, "/a", "a1", 1, 64, "a")])
