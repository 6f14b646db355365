"""The scripts of `shared/queue/lua/`, read back through RQ's own API, on Valkey and on Redis 6.2."""

import json
import time
from typing import Any

import pytest
import redis
from rq import Queue, Worker
from rq.job import Job, JobStatus
from rq.registry import FailedJobRegistry, FinishedJobRegistry, StartedJobRegistry
from rq.serializers import JSONSerializer
from rq.suspension import resume, suspend

from shared.errors import (
    ContextLengthExceeded,
    GenerationFailed,
    GenerationStopped,
    LorelayError,
    QueueFull,
    ServerBusy,
)
from shared.messages import SCHEMA_VERSION, FinishReason, GenerationRequest, decode_event
from shared.queue import keys
from shared.queue.places import tenant_key
from shared.queue.records import Append, Claim, Held
from shared.queue.scripts import script_source
from shared.queue.worker_streams import WorkerStreams
from tests.streams import (
    BASE,
    CHANNEL,
    SECRET,
    BlockingApi,
    choose,
    claim,
    last,
    make_request,
    reaper,
    token,
    worker_streams,
)
from tests.waiting import wait_until


def fetch(connection: redis.Redis, request_id: str) -> Job:
    return Job.fetch(request_id, connection=connection, serializer=JSONSerializer)


def queue(connection: redis.Redis, name: str = BASE) -> Queue:
    return Queue(name, connection=connection, serializer=JSONSerializer)


def waiting(connection: redis.Redis) -> list[str]:
    return [name.decode() for name in connection.zrange(keys.waiting(BASE), 0, -1)]


def ours(connection: redis.Redis) -> set[str]:
    """Our keys that name a request."""
    return {key.decode() for key in connection.keys("lorelay:*chatcmpl*")}


def test_an_enqueued_request_is_a_queued_job_to_rq(connection: redis.Redis, api: BlockingApi) -> None:
    request_id = api.enqueue(make_request("pirate"))
    job = fetch(connection, request_id)
    assert job.get_status() == JobStatus.QUEUED
    assert job.func_name == "worker.jobs.generate"
    assert job.origin == "tiny-pirate"
    assert queue(connection, "tiny-pirate").job_ids == [request_id]
    assert queue(connection, "tiny-pirate") in Queue.all(connection, serializer=JSONSerializer)
    assert abs(job.enqueued_at.timestamp() - time.time()) < 60
    assert job.result_ttl == 60


def test_redis_writes_the_dates_that_rq_reads(connection: redis.Redis) -> None:
    iso = connection.register_script(
        script_source("renew").split("local base")[0] + "return iso(tonumber(ARGV[1]))"
    )
    for microseconds, text in [
        (0, b"1970-01-01T00:00:00.000000Z"),
        (951_827_696_123_456, b"2000-02-29T12:34:56.123456Z"),
        (1_709_251_199_999_999, b"2024-02-29T23:59:59.999999Z"),
        (4_107_542_400_000_000, b"2100-03-01T00:00:00.000000Z"),
    ]:
        assert iso(args=[microseconds]) == text


def test_enqueueing_the_same_id_twice_queues_it_once(connection: redis.Redis, api: BlockingApi) -> None:
    request = make_request()
    api.enqueue(request)
    api.enqueue(request)
    assert queue(connection).job_ids == [request.request_id]


def test_a_full_queue_refuses_and_leaves_nothing_behind(connection: redis.Redis, api: BlockingApi) -> None:
    api.enqueue(make_request(), depth=1)
    refused = make_request()
    with pytest.raises(QueueFull):
        api.enqueue(refused, depth=1)
    assert not Job.exists(refused.request_id, connection)
    api.enqueue(make_request("pirate"), depth=1)


def test_all_queues_of_a_base_share_a_limit(connection: redis.Redis, api: BlockingApi) -> None:
    api.enqueue(make_request("a"), total_depth=2)
    api.enqueue(make_request("b"), total_depth=2)
    with pytest.raises(QueueFull):
        api.enqueue(make_request("c"), total_depth=2)


def test_a_place_that_becomes_free_under_the_limit_is_given_away_at_once(
    connection: redis.Redis, api: BlockingApi
) -> None:
    api.enqueue(make_request("a"), total_depth=2)
    api.enqueue(make_request("b"), total_depth=2)
    claim(worker_streams(connection), 1)
    api.enqueue(make_request("c"), total_depth=2)
    with pytest.raises(QueueFull):
        api.enqueue(make_request("c"), total_depth=2)


def sized(tenant: str, num_bytes: int, adapter_name: str = "a", **values: Any) -> GenerationRequest:
    """A request of about this size."""
    messages = [{"role": "user", "content": "x" * num_bytes}]
    return make_request(adapter_name, tenant=tenant, messages=messages, **values)


def let_count(connection: redis.Redis) -> None:
    """Lets the next enqueue that reaches a limit count again, however soon it comes."""
    connection.hset(keys.backlog(BASE), "again_ms", 0)


def test_the_bytes_that_wait_for_a_base_are_bounded_over_all_its_queues(
    connection: redis.Redis, api: BlockingApi
) -> None:
    for adapter in ("a", "b"):
        api.enqueue(sized("", 40_000, adapter), num_bytes=100_000)
    with pytest.raises(QueueFull, match="bytes together are waiting"):
        api.enqueue(sized("", 40_000, "c"), num_bytes=100_000)
    api.enqueue(sized("", 100, "c"), num_bytes=100_000)
    claim(worker_streams(connection), 1)
    let_count(connection)
    api.enqueue(sized("", 40_000, "c"), num_bytes=100_000)


def test_one_tenant_has_a_share_of_the_bytes_and_another_one_the_rest(
    connection: redis.Redis, api: BlockingApi
) -> None:
    limits = {"num_bytes": 100_000, "tenant_share": 0.5}
    api.enqueue(sized("alice", 40_000), **limits)
    with pytest.raises(QueueFull, match="of this API key with"):
        api.enqueue(sized("alice", 40_000, "b"), **limits)
    api.enqueue(sized("alice", 100), **limits)
    api.enqueue(sized("bob", 40_000), **limits)
    api.enqueue(sized("", 100), **limits)


def test_a_single_request_is_let_in_whatever_its_size(connection: redis.Redis, api: BlockingApi) -> None:
    api.enqueue(sized("alice", 40_000), num_bytes=1000, tenant_share=0.5)
    with pytest.raises(QueueFull):
        api.enqueue(sized("alice", 10), num_bytes=1000, tenant_share=0.5)


def test_one_tenant_has_a_share_of_the_places_of_a_queue_and_of_all_queues(
    connection: redis.Redis, api: BlockingApi
) -> None:
    limits = {"depth": 4, "total_depth": 6, "tenant_share": 0.5}
    for _ in range(2):
        api.enqueue(sized("alice", 1), **limits)
    with pytest.raises(QueueFull, match="2 requests of this API key"):
        api.enqueue(sized("alice", 1), **limits)
    api.enqueue(sized("alice", 1, "b"), **limits)
    with pytest.raises(QueueFull, match="3 requests of this API key"):
        api.enqueue(sized("alice", 1, "c"), **limits)
    for _ in range(2):
        api.enqueue(sized("bob", 1), **limits)


@pytest.mark.parametrize("num_stale", [3, 150], ids=["few", "more than one call drops"])
def test_places_whose_requests_an_earlier_worker_took_refuse_nobody(
    connection: redis.Redis, api: BlockingApi, num_stale: int
) -> None:
    limits = {"depth": 4, "tenant_share": 0.5}
    for _ in range(2):
        api.enqueue(sized("bob", 1), **limits)
    line = f"1|00000000|{tenant_key('alice')}"
    stale = {f"{line}|2147483648|{number:016}|000001|gone-{number}": 0 for number in range(num_stale)}
    connection.zadd(keys.order(f"{BASE}-a"), stale)
    api.enqueue(sized("alice", 1), **limits)
    while connection.zcard(keys.order(f"{BASE}-a")) > 3:
        worker_streams(connection).sweep([f"{BASE}-a"])
    api.enqueue(sized("alice", 1), depth=100, tenant_share=0.02)
    with pytest.raises(QueueFull, match="2 requests of this API key"):
        api.enqueue(sized("alice", 1), depth=100, tenant_share=0.02)


def test_the_pause_between_two_counts_grows_with_the_number_of_requests(
    connection: redis.Redis, api: BlockingApi
) -> None:
    for _ in range(20):
        api.enqueue(sized("alice", 1000))
    connection.delete(keys.backlog(BASE))
    seconds, microseconds = connection.time()
    api.enqueue(sized("alice", 1000))
    pause_ms = float(connection.hget(keys.backlog(BASE), "again_ms")) - seconds * 1000 - microseconds / 1000
    assert pause_ms >= 19


def test_bytes_are_counted_again_if_the_count_was_lost_or_an_earlier_release_enqueued(
    connection: redis.Redis, api: BlockingApi
) -> None:
    api.enqueue(sized("", 40_000), num_bytes=50_000)
    connection.delete(keys.backlog(BASE))
    with pytest.raises(QueueFull):
        api.enqueue(sized("", 40_000), num_bytes=50_000)
    old = api.enqueue(sized("", 10), num_bytes=50_000)
    connection.hdel(f"rq:job:{old}", "bytes", "order")
    connection.delete(keys.backlog(BASE))
    api.enqueue(sized("", 10), num_bytes=50_000)
    assert connection.hget(keys.backlog(BASE), "total:num") is not None


def test_waiting_requests_are_not_read_each_time_that_one_is_enqueued(
    connection: redis.Redis, api: BlockingApi
) -> None:
    for _ in range(20):
        api.enqueue(sized("alice", 1000), num_bytes=1 << 20)
    connection.config_resetstat()
    for _ in range(10):
        api.enqueue(sized("alice", 1000), num_bytes=1 << 20)
    assert "cmdstat_lrange" not in connection.info("commandstats")


def test_enqueueing_does_not_count_all_queues_each_time(connection: redis.Redis, api: BlockingApi) -> None:
    for number in range(20):
        api.enqueue(make_request(f"x{number}"))
    connection.config_resetstat()
    for _ in range(10):
        api.enqueue(make_request("x0"))
    num_reads = connection.info("commandstats")["cmdstat_llen"]["calls"]
    assert num_reads <= 2 * 10


def test_a_claimed_request_is_a_started_job_of_its_worker(connection: redis.Redis, api: BlockingApi) -> None:
    request = make_request("pirate")
    api.enqueue(request)
    worker = Worker(["default"], name="w1", connection=connection)
    worker.register_birth()
    (claimed,) = claim(worker_streams(connection))
    assert claimed.request == request
    job = fetch(connection, request.request_id)
    assert job.get_status() == JobStatus.STARTED
    assert job.worker_name == "w1"
    assert StartedJobRegistry("tiny-pirate", connection).get_job_ids() == [request.request_id]
    assert [execution.id for execution in job.get_executions()] == [claimed.held.claim_id]
    (seen,) = Worker.all(connection=connection)
    assert seen.get_state() == "busy"
    assert [execution.job_id for execution in seen.get_current_executions()] == [request.request_id]
    assert waiting(connection) == []


def test_a_claim_tells_how_long_the_request_has_waited(connection: redis.Redis, api: BlockingApi) -> None:
    request_id = api.enqueue(make_request())
    connection.hincrbyfloat(f"rq:job:{request_id}", "enqueued_ms", -90_000)
    other = api.enqueue(make_request())
    connection.hset(f"rq:job:{other}", "enqueued_ms", "garbage")
    waited = {claimed.held.request_id: claimed.waited_s for claimed in claim(worker_streams(connection), 2)}
    assert 90 <= waited[request_id] < 150
    assert waited[other] == 0


def test_the_fewest_running_come_first_then_the_longest_waiting(
    connection: redis.Redis, api: BlockingApi
) -> None:
    flood = [api.enqueue(make_request("a")) for _ in range(4)]
    late = api.enqueue(make_request("b"))
    claimed = [c.held.request_id for c in claim(worker_streams(connection), 3)]
    assert claimed == [flood[0], late, flood[1]]
    claimed = [c.held.request_id for c in claim(worker_streams(connection), 1, running={"tiny-a": 2})]
    assert claimed == [flood[2]]


def test_what_a_worker_runs_already_counts_for_fairness(connection: redis.Redis, api: BlockingApi) -> None:
    api.enqueue(make_request("a"))
    late = api.enqueue(make_request("b"))
    (claimed,) = claim(worker_streams(connection), 1, running={"tiny-a": 1})
    assert claimed.held.request_id == late


def test_a_restricted_worker_claims_its_own_queues_only(connection: redis.Redis, api: BlockingApi) -> None:
    api.enqueue(make_request("a"))
    mine = api.enqueue(make_request("b"))
    claimed = claim(worker_streams(connection, served=["tiny-b", "tiny-c"]), 5)
    assert [c.held.request_id for c in claimed] == [mine]
    assert waiting(connection) == ["tiny-a"]


def test_a_request_of_a_newer_schema_stays_in_the_queue(connection: redis.Redis, api: BlockingApi) -> None:
    newer = api.enqueue(make_request("a"))
    connection.hset(f"rq:job:{newer}", "schema_version", SCHEMA_VERSION + 1)
    known = api.enqueue(make_request("b"))
    assert [c.held.request_id for c in claim(worker_streams(connection), 5)] == [known]
    assert queue(connection, "tiny-a").job_ids == [newer]


def test_a_claim_repeated_after_a_lost_reply_returns_what_it_claimed_and_nothing_else(
    connection: redis.Redis, api: BlockingApi
) -> None:
    ids = [api.enqueue(make_request()) for _ in range(4)]
    streams = worker_streams(connection)
    (former,) = claim(streams)
    claim_ids = ["e2", "e3"]
    picks = choose(streams, 2)
    claims = streams.claim(claim_ids, picks)
    suspend(connection)
    assert [again[:4] for again in streams.claim(claim_ids, picks)] == [first[:4] for first in claims]
    assert [c.held.request_id for c in [former, *claims]] == ids[:3]
    streams.hand_back([claims[0].held])
    Job.fetch(ids[2], connection, JSONSerializer).delete()
    assert streams.claim(claim_ids, picks) == []


def test_a_repeated_claim_renews_the_leases_and_says_again_what_must_run_alone(
    connection: redis.Redis, api: BlockingApi
) -> None:
    request_id = api.enqueue(make_request())
    connection.hset(Job.key_for(request_id), "crashes_alone", 1)
    streams = worker_streams(connection)
    picks = choose(streams, 1)
    (claimed,) = streams.claim(["e1"], picks)
    connection.zadd(keys.leases(BASE), {request_id: 1})
    assert [again[:4] for again in streams.claim(["e1"], picks)] == [claimed[:4]]
    assert claimed.alone
    assert connection.zscore(keys.leases(BASE), request_id) > 1


def test_a_suspended_worker_claims_nothing_until_resumed(connection: redis.Redis, api: BlockingApi) -> None:
    api.enqueue(make_request())
    suspend(connection)
    assert claim(worker_streams(connection)) == []
    resume(connection)
    assert len(claim(worker_streams(connection))) == 1


def test_a_job_deleted_from_outside_is_skipped(connection: redis.Redis, api: BlockingApi) -> None:
    deleted = api.enqueue(make_request())
    kept = api.enqueue(make_request())
    connection.delete(Job.key_for(deleted))
    assert [c.held.request_id for c in claim(worker_streams(connection), 5)] == [kept]


def test_events_stand_in_the_log_in_order_and_are_published_once_per_step(
    connection: redis.Redis, api: BlockingApi
) -> None:
    ids = [api.enqueue(make_request()) for _ in range(2)]
    with connection.pubsub() as pubsub:
        pubsub.subscribe(CHANNEL)
        pubsub.get_message(timeout=5)
        streams = worker_streams(connection)
        claims = claim(streams, 2)
        held = [c.held for c in claims]
        for event_no in range(2):
            streams.append(held, [token(c, event_no) for c in claims])
        messages = [pubsub.get_message(timeout=5) for _ in range(2)]
        assert pubsub.get_message() is None
    lines = [line.split(b" ", 1) for message in messages for line in message["data"].split(b"\n")]
    assert [line[0].decode() for line in lines] == ids * 2
    assert [line[1] for line in lines if line[0].decode() == ids[0]] == connection.lrange(
        keys.log(ids[0]), 0, -1
    )


def test_an_append_repeated_after_a_lost_reply_changes_nothing(
    connection: redis.Redis, api: BlockingApi
) -> None:
    request_id = api.enqueue(make_request())
    streams = worker_streams(connection)
    (claimed,) = claim(streams)
    for _ in range(2):
        streams.append([claimed.held], [token(claimed, 0), token(claimed, 1)])
    assert connection.llen(keys.log(request_id)) == 2
    end = [last(claimed, 2)]
    streams.append([claimed.held], end)
    assert streams.append([claimed.held], end).lost == [request_id]
    assert connection.llen(keys.log(request_id)) == 3
    assert FinishedJobRegistry(BASE, connection).get_job_ids() == [request_id]


def test_the_append_of_a_former_owner_is_refused(connection: redis.Redis, api: BlockingApi) -> None:
    request_id = api.enqueue(make_request())
    stalled = worker_streams(connection, "stalled", lease_s=0.001)
    (old,) = claim(stalled)
    stalled.append([old.held], [token(old, 0, "a")])
    wait_until_reaped(reaper(connection), request_id)
    (new,) = claim(worker_streams(connection, "next"))
    assert [event.text for event in new.events] == ["a"]
    assert stalled.append([old.held], [token(old, 1, "wrong"), last(old, 2)]).lost == [request_id]
    assert connection.llen(keys.log(request_id)) == 1
    assert fetch(connection, request_id).worker_name == "next"


def test_the_append_of_a_former_claim_by_the_same_worker_is_refused(
    connection: redis.Redis, api: BlockingApi
) -> None:
    request_id = api.enqueue(make_request())
    streams = worker_streams(connection)
    (old,) = claim(streams)
    streams.hand_back([old.held])
    (new,) = claim(streams)
    streams.append([new.held], [token(old, 0, "wrong"), token(new, 0, "right")])
    (event,) = connection.lrange(keys.log(request_id), 0, -1)
    assert decode_event(event).text == "right"


def test_a_finished_request_is_a_finished_job_with_usage_and_no_text(
    connection: redis.Redis, api: BlockingApi
) -> None:
    request_id = api.enqueue(make_request("pirate"))
    worker = Worker(["default"], name="w1", connection=connection)
    worker.register_birth()
    streams = worker_streams(connection)
    (claimed,) = claim(streams)
    streams.append([claimed.held], [token(claimed, 0, "arr")])
    streams.append([claimed.held], [last(claimed, 1)])
    job = fetch(connection, request_id)
    assert job.get_status() == JobStatus.FINISHED
    assert job.meta == {"model": "pirate", "completion_tokens": 1}
    assert job.ended_at >= job.started_at >= job.enqueued_at
    result = job.latest_result()
    assert result.type == result.Type.SUCCESSFUL
    assert result.return_value == job.meta
    assert FinishedJobRegistry("tiny-pirate", connection).get_job_ids() == [request_id]
    assert StartedJobRegistry("tiny-pirate", connection).count == 0
    assert job.get_executions() == []
    worker.refresh()
    assert (worker.get_state(), worker.successful_job_count) == ("idle", 1)
    assert ours(connection) == {keys.log(request_id), keys.reader(request_id)}
    assert all(0 < connection.ttl(key) <= 60 for key in (*ours(connection), job.key))


def test_a_failed_request_is_a_failed_job_with_its_reason(connection: redis.Redis, api: BlockingApi) -> None:
    request_id = api.enqueue(make_request())
    streams = worker_streams(connection)
    (claimed,) = claim(streams)
    error = GenerationFailed("it broke").to_info()
    streams.append(
        [claimed.held], [last(claimed, 0, usage=None, finish_reason=FinishReason.ERROR, error=error)]
    )
    job = fetch(connection, request_id)
    assert job.get_status() == JobStatus.FAILED
    assert job.latest_result().exc_string == "generation_failed: it broke"
    assert FailedJobRegistry(BASE, connection).get_job_ids() == [request_id]


def refused(claimed: Claim, error: LorelayError) -> Append:
    return last(claimed, 0, usage=None, finish_reason=FinishReason.ERROR, error=error.to_info())


def all_values(connection: redis.Redis) -> str:
    """All that Redis holds, as text."""
    connection.config_set("rdbcompression", "no")  # or a dump would abbreviate what it has twice
    dumps = [connection.dump(key) or b"" for key in connection.keys("*")]
    return repr(dumps)


@pytest.mark.parametrize(
    ("error", "detached"),
    [(ContextLengthExceeded(), False), (ContextLengthExceeded(), True), (ServerBusy(), False)],
)
def test_a_request_that_its_client_has_to_correct_or_repeat_is_no_failure_and_leaves_no_prompt(
    connection: redis.Redis, api: BlockingApi, error: LorelayError, detached: bool
) -> None:
    worker = Worker([queue(connection)], connection=connection, name="w1")
    worker.register_birth()
    request_id = api.enqueue(make_request(detached=detached))
    streams = worker_streams(connection)
    (claimed,) = claim(streams)
    assert SECRET in all_values(connection)
    streams.append([claimed.held], [refused(claimed, error)])
    assert SECRET not in all_values(connection)
    assert FailedJobRegistry(BASE, connection).count == FinishedJobRegistry(BASE, connection).count == 0
    assert connection.exists(f"rq:results:{request_id}") == 0
    worker.refresh()
    assert (worker.failed_job_count, worker.successful_job_count) == (0, 0)
    assert decode_event(connection.lindex(keys.log(request_id), -1)).error.code == error.code
    assert all(0 < connection.ttl(key) <= 60 for key in (*ours(connection), f"rq:job:{request_id}"))


def test_an_aborted_request_leaves_no_prompt(connection: redis.Redis, api: BlockingApi) -> None:
    waiting_one, running_one = (api.enqueue(make_request(name)) for name in ("a", "b"))
    streams = worker_streams(connection)
    api.abort(waiting_one)
    (claimed,) = claim(streams, 2)
    assert claimed.held.request_id == running_one
    streams.append([claimed.held], [last(claimed, 0, finish_reason=FinishReason.ABORT)])
    assert {fetch(connection, name).get_status() for name in (waiting_one, running_one)} == {"canceled"}
    assert SECRET not in all_values(connection)


def test_rqs_own_cleaners_leave_running_requests_alone(connection: redis.Redis, api: BlockingApi) -> None:
    request_id = api.enqueue(make_request())
    streams = worker_streams(connection)
    (claimed,) = claim(streams)
    StartedJobRegistry(BASE, connection, serializer=JSONSerializer).cleanup(time.time() + 1e9)
    assert fetch(connection, request_id).get_status() == JobStatus.STARTED
    assert streams.append([claimed.held], [last(claimed, 0)]).lost == []


def test_an_aborted_request_that_waits_never_starts(connection: redis.Redis, api: BlockingApi) -> None:
    other = api.enqueue(make_request())
    request_id = api.enqueue(make_request())
    assert api.abort(request_id) == "queued"
    assert queue(connection).job_ids == [other]
    api.abort(other)
    assert claim(worker_streams(connection)) == []
    assert fetch(connection, request_id).get_status() == JobStatus.CANCELED
    assert waiting(connection) == []
    assert ours(connection) == set()


def test_an_aborted_request_that_runs_is_told_to_its_owner_and_ends_canceled(
    connection: redis.Redis, api: BlockingApi
) -> None:
    request_id = api.enqueue(make_request())
    streams = worker_streams(connection)
    (claimed,) = claim(streams)
    assert api.abort(request_id, only_queued=True) == "running"
    assert streams.renew([claimed.held]).aborted == []
    assert api.abort(request_id) == "running"
    assert streams.renew([claimed.held]).aborted == [request_id]
    assert streams.append([claimed.held], []).aborted == [request_id]
    streams.append([claimed.held], [last(claimed, 0, finish_reason=FinishReason.ABORT)])
    assert fetch(connection, request_id).get_status() == JobStatus.CANCELED
    assert api.abort(request_id) == "gone"


@pytest.mark.parametrize("lost_by", ["hand back", "reap"])
def test_an_abort_is_not_forgotten_when_its_worker_leaves(
    connection: redis.Redis, api: BlockingApi, lost_by: str
) -> None:
    request_id = api.enqueue(make_request())
    streams = worker_streams(connection, lease_s=0.001)
    (claimed,) = claim(streams)
    api.abort(request_id)
    if lost_by == "hand back":
        streams.hand_back([claimed.held])
    else:
        wait_until(lambda: expired(connection) == 1)
        assert reaper(connection).reap() == ([], [])
    assert claim(streams) == []
    assert fetch(connection, request_id).get_status() == JobStatus.CANCELED
    (event,) = connection.lrange(keys.log(request_id), 0, -1)
    assert decode_event(event).finish_reason is FinishReason.ABORT


def test_rqs_registries_forget_jobs_that_have_expired(connection: redis.Redis, api: BlockingApi) -> None:
    kept = api.enqueue(make_request())
    streams = worker_streams(connection)
    (claimed,) = claim(streams)
    streams.append([claimed.held], [last(claimed, 0)])
    for registry in ("finished", "failed", "canceled"):
        connection.zadd(f"rq:{registry}:{BASE}", {"long gone": 1})
    streams.sweep([BASE])
    assert connection.zrange(f"rq:finished:{BASE}", 0, -1) == [kept.encode()]
    assert connection.exists(f"rq:failed:{BASE}", f"rq:canceled:{BASE}") == 0


def test_a_job_deleted_while_it_runs_is_lost_to_its_owner(connection: redis.Redis, api: BlockingApi) -> None:
    request_id = api.enqueue(make_request())
    streams = worker_streams(connection)
    (claimed,) = claim(streams)
    fetch(connection, request_id).delete()
    assert streams.append([claimed.held], [token(claimed, 0)]).lost == [request_id]
    assert StartedJobRegistry(BASE, connection).count == 0
    assert reaper(connection).reap().requeued == []


def test_a_renewed_lease_is_not_reaped_and_an_expired_one_once(
    connection: redis.Redis, api: BlockingApi
) -> None:
    request_id = api.enqueue(make_request())
    (claimed,) = claim(worker_streams(connection, lease_s=0.001))
    worker_streams(connection).renew([claimed.held])
    other = reaper(connection, "other")
    assert other.reap().requeued == []
    worker_streams(connection, lease_s=0.001).renew([claimed.held])
    wait_until_reaped(other, request_id)
    assert other.reap().requeued == []
    assert queue(connection).job_ids == [request_id]
    assert fetch(connection, request_id).get_status() == JobStatus.QUEUED
    assert waiting(connection) == [BASE]


def test_a_worker_whose_own_lease_ran_out_judges_nobody(connection: redis.Redis, api: BlockingApi) -> None:
    request_id = api.enqueue(make_request())
    claim(worker_streams(connection, lease_s=0.001))
    late = worker_streams(connection, "late", lease_s=-1)
    late.renew([])
    wait_until(lambda: expired(connection) == 1)
    assert late.reap().requeued == []
    orphan = api.enqueue(make_request())
    (held,) = claim(late)
    connection.delete(CHANNEL)
    news = worker_streams(connection, "late").renew([held.held], abort_unread=True)
    assert (news.aborted, news.had_lease) == ([], False)
    news = worker_streams(connection, "late").renew([held.held], abort_unread=True)
    assert (news.aborted, news.had_lease) == ([orphan], True)
    assert worker_streams(connection, "late").reap().requeued == [request_id]


def test_requests_handed_back_stand_in_front_in_their_old_order(
    connection: redis.Redis, api: BlockingApi
) -> None:
    ids = [api.enqueue(make_request()) for _ in range(3)]
    streams = worker_streams(connection)
    held = [c.held for c in claim(streams, 2)]
    assert streams.hand_back(held) == 2
    assert queue(connection).job_ids == ids
    assert streams.hand_back(held) == 0
    assert [c.held.request_id for c in claim(streams, 3)] == ids


def test_the_doorbell_rings_for_a_request_that_came_before_the_wait(
    connection: redis.Redis, api: BlockingApi
) -> None:
    streams = worker_streams(connection)
    assert not streams.wait_for_doorbell(0.01)
    api.enqueue(make_request())
    assert streams.wait_for_doorbell(5)


def test_a_doorbell_of_another_type_is_mended_by_who_waits_for_it(connection: redis.Redis) -> None:
    streams = worker_streams(connection)
    connection.set(keys.doorbell(BASE), "garbage")
    assert streams.wait_for_doorbell(5)
    assert connection.type(keys.doorbell(BASE)) == b"none"


def test_keys_of_another_type_that_only_rq_and_blocking_workers_read_are_mended_by_a_sweep(
    connection: redis.Redis,
) -> None:
    for key in (keys.doorbell(BASE), "rq:queues"):
        connection.set(key, "garbage")
    worker_streams(connection).sweep([BASE])
    assert connection.exists(keys.doorbell(BASE), "rq:queues") == 0


def test_no_prompt_stands_where_rq_shows_it(connection: redis.Redis, api: BlockingApi) -> None:
    request_id = api.enqueue(make_request())
    job = fetch(connection, request_id)
    shown = f"{job.description} {job.args} {job.kwargs} {job.meta} {job.get_call_string()} {job!r}"
    assert SECRET not in shown
    assert SECRET.encode() in connection.hget(job.key, "request")


def crash(connection: redis.Redis, name: str, num_requests: int, num_events: int = 0) -> list[Claim]:
    """A worker claims, writes some events of each, and dies; its leases are reaped."""
    streams = worker_streams(connection, name, lease_s=0.001)
    claims = claim(streams, num_requests)
    held = [c.held for c in claims]
    for _ in range(num_events):
        streams.append(held, [token(c, connection.llen(keys.log(c.held.request_id))) for c in claims])
    wait_until(lambda: expired(connection) == len(claims))
    reaper(connection).reap(max_crashes_alone=3)
    return claims


def expire(connection: redis.Redis, held: Held) -> None:
    """A lease whose time is over."""
    connection.zadd(keys.leases(BASE), {held.request_id: 0})


def expired(connection: redis.Redis) -> int:
    seconds, microseconds = connection.time()
    return connection.zcount(keys.leases(BASE), "-inf", seconds * 1000 + microseconds // 1000)


def counts(connection: redis.Redis, request_id: str) -> list[bytes | None]:
    return connection.hmget(Job.key_for(request_id), "crashes_alone", "suspect")


def test_a_request_that_crashes_its_worker_alone_three_times_is_dead_lettered_and_its_client_told(
    connection: redis.Redis, api: BlockingApi
) -> None:
    request_id = api.enqueue(make_request())
    with connection.pubsub() as pubsub:
        pubsub.subscribe(CHANNEL)
        pubsub.get_message(timeout=5)
        for attempt in range(3):
            assert fetch(connection, request_id).get_status() == JobStatus.QUEUED
            crash(connection, f"w{attempt}", 1, num_events=1)
        messages = [pubsub.get_message(timeout=5) for _ in range(4)]
    told = decode_event(messages[-1]["data"].split(b" ", 1)[1])
    assert (told.event_no, told.error.code) == (3, "generation_failed")
    assert decode_event(connection.lindex(keys.log(request_id), -1)) == told
    job = fetch(connection, request_id)
    assert job.get_status() == JobStatus.FAILED
    assert "crashed its worker 3 times" in job.latest_result().exc_string
    assert FailedJobRegistry(BASE, connection).get_job_ids() == [request_id]
    assert waiting(connection) == []


@pytest.mark.parametrize("num_requests", [1, 2], ids=["alone", "in company"])
def test_a_crash_by_exception_counts_like_one_by_kill(
    connection: redis.Redis, api: BlockingApi, num_requests: int
) -> None:
    ids = [api.enqueue(make_request()) for _ in range(num_requests)]
    worker = Worker(["default"], name="w0", connection=connection)
    worker.register_birth()
    claims = claim(worker_streams(connection, "w0"), num_requests)
    # RQ's teardown, which a worker that ends with an exception still goes through.
    worker.register_death()
    for claimed in claims:
        expire(connection, claimed.held)
        reaper(connection).reap()
    expected = [b"1", None] if num_requests == 1 else [None, b"1"]
    assert [counts(connection, request_id) for request_id in ids] == [expected] * num_requests


def test_a_request_whose_owner_was_removed_from_outside_goes_on_elsewhere(
    connection: redis.Redis, api: BlockingApi
) -> None:
    request_id = api.enqueue(make_request())
    (claimed,) = claim(worker_streams(connection, "w0"))
    connection.delete(keys.owner(request_id))
    expire(connection, claimed.held)
    reaper(connection).reap()
    other = worker_streams(connection, "w1")
    (claimed,) = claim(other)
    assert claimed.held.request_id == request_id
    other.append([claimed.held], [last(claimed, 0)])
    assert not executions(connection)


def test_a_request_whose_owner_is_garbage_leaves_no_record_of_its_claim(
    connection: redis.Redis, api: BlockingApi
) -> None:
    request_id = api.enqueue(make_request())
    streams = worker_streams(connection)
    (claimed,) = claim(streams)
    connection.delete(keys.owner(request_id))
    connection.set(keys.owner(request_id), "garbage")
    assert executions(connection)
    streams.renew([claimed.held])
    assert fetch(connection, request_id).get_status() == JobStatus.FAILED
    assert not executions(connection)


def executions(connection: redis.Redis) -> list[bytes]:
    """RQ's records of claims: executions, and the lists of them by job, worker and queue."""
    patterns = ("rq:execution:*", "rq:executions:*", "rq:worker:*:executions", "rq:wip:*")
    return [key for pattern in patterns for key in connection.scan_iter(pattern)]


def test_leases_that_were_removed_from_outside_come_back(connection: redis.Redis, api: BlockingApi) -> None:
    ids = [api.enqueue(make_request()) for _ in range(2)]
    living, _ = claim(worker_streams(connection, "w1"), 1), claim(worker_streams(connection, "dead"), 1)
    connection.delete(keys.leases(BASE))
    worker_streams(connection, "w1").renew([living[0].held])
    other = reaper(connection)
    other.sweep([BASE])
    wait_until(lambda: expired(connection) == 1, what="the lease of the dead worker's request")
    assert other.reap().requeued == [ids[1]]


def test_a_crash_in_company_makes_suspects_and_charges_nobody(
    connection: redis.Redis, api: BlockingApi
) -> None:
    ids = [api.enqueue(make_request()) for _ in range(3)]
    crash(connection, "w0", 3)
    assert [counts(connection, request_id) for request_id in ids] == [[None, b"1"]] * 3
    assert [c.alone for c in claim(worker_streams(connection), 3)] == [False] * 3


def test_leases_that_end_one_after_another_still_count_as_company(
    connection: redis.Redis, api: BlockingApi
) -> None:
    ids = [api.enqueue(make_request()) for _ in range(2)]
    other = reaper(connection)
    for claimed in claim(worker_streams(connection, "w1"), 2):
        expire(connection, claimed.held)
        assert other.reap().requeued == [claimed.held.request_id]
    assert [counts(connection, request_id) for request_id in ids] == [[None, b"1"]] * 2


def test_a_suspect_of_two_crashes_runs_alone_and_is_the_last_of_a_claim(
    connection: redis.Redis, api: BlockingApi
) -> None:
    suspects = [api.enqueue(make_request("a")), api.enqueue(make_request("a"))]
    for attempt in range(2):
        crash(connection, f"w{attempt}", 2)
    other = api.enqueue(make_request("b"))
    serving_b = worker_streams(connection, "w2", served=[f"{BASE}-b"])
    serving_b.hand_back([c.held for c in claim(serving_b)])
    first, second = claim(worker_streams(connection), 3, running={f"{BASE}-a": 1})
    assert (first.held.request_id, first.alone) == (other, False)
    assert (second.held.request_id in suspects, second.alone) == (True, True)


def test_a_worker_that_came_back_is_judged_by_what_it_holds_when_it_crashes(
    connection: redis.Redis, api: BlockingApi
) -> None:
    for _ in range(2):
        api.enqueue(make_request())
    crash(connection, "stopped", 2)
    claim(worker_streams(connection, "w2"), 2)
    worker_streams(connection, "stopped").renew([])
    request_id = api.enqueue(make_request())
    crash(connection, "stopped", 1)
    assert counts(connection, request_id) == [b"1", None]


@pytest.mark.parametrize("is_isolated", [True, False], ids=["isolated", "not yet"])
def test_a_crash_while_one_ran_alone_charges_that_one_and_before_it_did_all(
    connection: redis.Redis, api: BlockingApi, is_isolated: bool
) -> None:
    suspect = api.enqueue(make_request("a"))
    connection.hset(Job.key_for(suspect), "suspect", 2)
    dying = worker_streams(connection, "w1")
    (lone,) = claim(dying, 1)
    if is_isolated:
        dying.append([lone.held], [], isolated=lone.held.request_id)
    others = [api.enqueue(make_request("b")) for _ in range(2)]
    other = reaper(connection)
    for claimed in (lone, *claim(dying, 2)):
        expire(connection, claimed.held)
        other.reap()
    assert counts(connection, suspect) == ([b"1", b"2"] if is_isolated else [None, b"3"])
    assert [counts(connection, request_id) for request_id in others] == [
        [None, None if is_isolated else b"1"]
    ] * 2


def test_a_suspect_is_cleared_by_sixteen_more_events(connection: redis.Redis, api: BlockingApi) -> None:
    request_id = api.enqueue(make_request())
    crash(connection, "w0", 1, num_events=4)
    assert counts(connection, request_id) == [b"1", None]
    crash(connection, "w1", 1, num_events=16)
    assert counts(connection, request_id) == [b"2", None]
    streams = worker_streams(connection, "w2")
    (claimed,) = claim(streams)
    for event_no in range(20, 37):
        streams.append([claimed.held], [token(claimed, event_no)])
    assert counts(connection, request_id) == [None, None]


def test_a_hand_back_counts_as_no_crash(connection: redis.Redis, api: BlockingApi) -> None:
    request_id = api.enqueue(make_request())
    streams = worker_streams(connection)
    streams.hand_back([c.held for c in claim(streams)])
    assert counts(connection, request_id) == [None, None]


def test_a_request_whose_api_let_its_lease_run_out_is_aborted_unless_detached(
    connection: redis.Redis, api: BlockingApi
) -> None:
    orphan = api.enqueue(make_request())
    api.enqueue(make_request(detached=True))
    streams = worker_streams(connection)
    held = [c.held for c in claim(streams, 2)]
    assert streams.renew(held).aborted == []
    assert streams.renew(held, abort_unread=True).aborted == [orphan]
    connection.set(CHANNEL, 1, px=60_000)
    assert streams.renew(held, abort_unread=True).aborted == []


def test_what_an_operator_requeues_is_noticed_and_begins_anew(
    connection: redis.Redis, api: BlockingApi
) -> None:
    request_id = api.enqueue(make_request())
    streams = worker_streams(connection)
    (claimed,) = claim(streams)
    error = GenerationFailed().to_info()
    streams.append([claimed.held], [token(claimed, 0)])
    streams.append([claimed.held], [last(claimed, 1, usage=None, error=error)])
    FailedJobRegistry(BASE, connection, serializer=JSONSerializer).requeue(request_id)
    assert claim(streams) == []
    assert streams.sweep([BASE, "tiny-a"]) == 1
    (again,) = claim(streams)
    assert (again.request, again.events) == (claimed.request, ())
    assert streams.renew([again.held], abort_unread=True).aborted == []
    streams.append([again.held], [last(again, 0)])
    assert fetch(connection, request_id).get_status() == JobStatus.FINISHED


def test_a_queue_emptied_by_an_operator_waits_no_more(connection: redis.Redis, api: BlockingApi) -> None:
    api.enqueue(make_request())
    queue(connection).empty()
    assert worker_streams(connection).sweep([BASE]) == 0
    assert waiting(connection) == []


def test_the_client_of_a_job_deleted_while_it_runs_gets_an_error(
    connection: redis.Redis, api: BlockingApi
) -> None:
    request_id = api.enqueue(make_request())
    streams = worker_streams(connection)
    (claimed,) = claim(streams)
    fetch(connection, request_id).delete()
    streams.append([claimed.held], [token(claimed, 0)])
    (event,) = [decode_event(entry) for entry in connection.lrange(keys.log(request_id), 0, -1)]
    assert event.error.code == "generation_failed"
    assert 0 < connection.ttl(keys.log(request_id)) <= 60


def test_a_job_of_somebody_else_on_our_queue_fails_and_blocks_nobody(
    connection: redis.Redis, api: BlockingApi
) -> None:
    foreign = queue(connection).enqueue("os.getpid")
    ours_id = api.enqueue(make_request())
    assert [c.held.request_id for c in claim(worker_streams(connection), 2)] == [ours_id]
    assert foreign.get_status() == JobStatus.FAILED


@pytest.mark.parametrize("status", ["deferred", "no status of RQ's"])
def test_a_request_that_waits_with_another_status_is_set_aside(
    connection: redis.Redis, api: BlockingApi, status: str
) -> None:
    broken, good = api.enqueue(make_request()), api.enqueue(make_request())
    connection.hset(Job.key_for(broken), "status", status)
    assert [c.held.request_id for c in claim(worker_streams(connection), 2)] == [good]
    assert decode_event(connection.lindex(keys.log(broken), -1)).error.code == "generation_failed"


def test_a_job_of_ours_without_its_request_is_set_aside(connection: redis.Redis, api: BlockingApi) -> None:
    broken, good = api.enqueue(make_request()), api.enqueue(make_request())
    connection.hdel(Job.key_for(broken), "request")
    assert [c.held.request_id for c in claim(worker_streams(connection), 2)] == [good]
    assert decode_event(connection.lindex(keys.log(broken), -1)).error.code == "generation_failed"


@pytest.mark.parametrize(
    "change",
    [
        {"sampling": {"seed": -1}},
        {"sampling": {"seed": 2**70}},
        {"sampling": {"top_k": 10**30}},
        {"sampling": {"max_tokens": 0}},
        {"sampling": {"stop": ["x"] * 100}},
        {"n": 10**10},
        {"adapter_name": "b"},
        {"base_version": "m9"},
        {"request_id": "chatcmpl-other"},
    ],
    ids=str,
)
def test_a_request_with_values_that_no_api_sends_is_set_aside(
    connection: redis.Redis, api: BlockingApi, change: dict[str, Any]
) -> None:
    broken, good = api.enqueue(make_request()), api.enqueue(make_request())
    sent = json.loads(connection.hget(Job.key_for(broken), "request") or b"")
    connection.hset(Job.key_for(broken), "request", json.dumps(sent | change))
    assert [c.held.request_id for c in claim(worker_streams(connection), 2)] == [good]
    assert b"request" in connection.hget(Job.key_for(broken), "meta")
    assert fetch(connection, broken).get_status() == JobStatus.FAILED


def test_an_event_of_somebody_else_in_a_log_sets_its_request_aside(
    connection: redis.Redis, api: BlockingApi
) -> None:
    broken, good = api.enqueue(make_request()), api.enqueue(make_request())
    streams = worker_streams(connection)
    claims = claim(streams, 2)
    connection.rpush(keys.log(broken), '{"event_no":0,"text":"?"}')
    assert streams.append([c.held for c in claims], [token(c, 0) for c in claims]).lost == [broken]
    assert connection.llen(keys.log(good)) == 1


def test_a_log_that_lost_events_sets_its_request_aside_and_gets_no_later_event(
    connection: redis.Redis, api: BlockingApi
) -> None:
    broken, good = api.enqueue(make_request()), api.enqueue(make_request())
    streams = worker_streams(connection)
    claims = claim(streams, 2)
    held = [c.held for c in claims]
    for event_no in range(2):
        streams.append(held, [token(c, event_no) for c in claims])
    connection.ltrim(keys.log(broken), 0, 0)
    assert streams.append(held, [token(c, 2) for c in claims]).lost == [broken]
    first, end = [decode_event(entry) for entry in connection.lrange(keys.log(broken), 0, -1)]
    assert (first.event_no, end.event_no) == (0, 1)
    assert end.error.code == "generation_failed"
    assert connection.llen(keys.log(good)) == 3


def test_a_stopped_request_is_a_stopped_job(connection: redis.Redis, api: BlockingApi) -> None:
    request_id = api.enqueue(make_request())
    streams = worker_streams(connection)
    (claimed,) = claim(streams)
    stopped = last(claimed, 0, usage=None, finish_reason="error", error=GenerationStopped().to_info())
    streams.append([claimed.held], [stopped])
    assert fetch(connection, request_id).get_status() == JobStatus.STOPPED
    assert FailedJobRegistry(BASE, connection).get_job_ids() == [request_id]


@pytest.mark.parametrize(
    ("waits_s", "num_ended_by_slice", "expected_s"),
    [
        (0, {}, (1, 1)),  # a burst at a server that just started, or was idle
        (0, {5: 1}, (1, 1)),
        (20, {}, (20, 24)),  # nothing moves: perhaps no worker is there
        (300, {}, (50, 60)),
        (60, {4: 4, 2: 3, 0: 3}, (25, 30)),  # 10 in 50 to 60 s
        (20, {5: 100, 1: 4}, (25, 30)),  # 4 in 20 s: what ended before anyone waited tells nothing
        (60, {0: 300}, (1, 1)),
    ],
)
def test_a_full_queue_says_when_to_come_back_from_how_fast_it_drains(
    connection: redis.Redis,
    api: BlockingApi,
    waits_s: int,
    num_ended_by_slice: dict[int, int],
    expected_s: tuple[int, int],
) -> None:
    """Slices are of 10 s, counted back from now."""
    seconds, microseconds = connection.time()
    for back, num_ended in num_ended_by_slice.items():
        connection.set(keys.drained(BASE, seconds // 10 - back), num_ended)
    api.enqueue(make_request())
    connection.zadd(keys.waiting(BASE), {BASE: (seconds - waits_s) * 1000 + microseconds // 1000})
    with pytest.raises(QueueFull) as refused:
        api.enqueue(make_request(), depth=1)
    least_s, most_s = expected_s
    assert least_s <= refused.value.retry_after_s <= most_s


def test_every_ended_request_counts_for_the_drain_rate(connection: redis.Redis, api: BlockingApi) -> None:
    api.enqueue(make_request())
    streams = worker_streams(connection)
    (claimed,) = claim(streams)
    streams.append([claimed.held], [last(claimed, 0)])
    (key,) = connection.keys("lorelay:drained:*")
    assert connection.get(key) == b"1"


def wait_until_reaped(streams: WorkerStreams, request_id: str) -> None:
    wait_until(lambda: request_id in streams.reap().requeued)
