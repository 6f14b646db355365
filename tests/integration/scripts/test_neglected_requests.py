"""Requests that no worker of ours looks after: taken by a stock worker, or without any worker."""

import pytest
import redis
import rq
from rq import Queue, SimpleWorker
from rq.job import Job
from rq.serializers import DefaultSerializer, JSONSerializer

from shared.messages import decode_event
from shared.queue import keys
from shared.queue.api_streams import TakenByOther
from shared.queue.worker_streams import WorkerStreams
from tests.streams import BASE, BlockingApi, claim, last, make_request, token, worker_streams

MAX_NUM_TAKEN = 10
LIST = f"rq:queue:{BASE}"


@pytest.fixture
def streams(connection: redis.Redis) -> WorkerStreams:
    return worker_streams(connection)


def take(connection: redis.Redis, serializer: type = JSONSerializer) -> None:
    """Runs a stock worker of RQ until the queue is empty."""
    queue = Queue(BASE, connection=connection, serializer=serializer)
    worker = SimpleWorker([queue], connection=connection, serializer=serializer)
    worker.work(burst=True, logging_level="ERROR")


def pass_deadline(connection: redis.Redis, *request_ids: str) -> None:
    for request_id in request_ids:
        assert connection.hexists(Job.key_for(request_id), "deadline_ms")
        connection.hset(Job.key_for(request_id), "deadline_ms", 1)


@pytest.mark.parametrize("serializer", [JSONSerializer, DefaultSerializer], ids=lambda cls: cls.__name__)
def test_a_request_that_a_stock_worker_took_goes_back_and_runs(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams, serializer: type
) -> None:
    request_id = api.enqueue(make_request(wait_limit_s=100))
    deadline = connection.hget(Job.key_for(request_id), "deadline_ms")
    take(connection, serializer)
    assert isinstance(api.why_vanished(request_id), TakenByOther)
    assert api.take_back(request_id) == "queued"
    assert api.why_vanished(request_id) is None
    assert connection.hget(Job.key_for(request_id), "deadline_ms") == deadline
    assert connection.ttl(Job.key_for(request_id)) == -1
    assert connection.zcard(f"rq:failed:{BASE}") == 0
    (claimed,) = claim(streams)
    assert claimed.held.request_id == request_id
    streams.append([claimed.held], [token(claimed, 0), last(claimed, 1)])
    assert Job.fetch(request_id, connection, JSONSerializer).get_status() == "finished"


@pytest.mark.parametrize("detached", [True, False])
def test_a_worker_of_ours_that_meets_a_taken_request_takes_it_back(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams, detached: bool
) -> None:
    request_id = api.enqueue(make_request(detached=detached))
    take(connection)
    assert [claimed.held.request_id for claimed in claim(streams)] == [request_id]


def test_a_request_that_a_stock_worker_took_and_never_began_goes_back(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams
) -> None:
    request_id = api.enqueue(make_request())
    connection.lmove(LIST, f"{LIST}:intermediate")
    streams.sweep([BASE])
    assert claim(streams) == []
    noted_ms = float(connection.hget(Job.key_for(request_id), "stuck_since_ms") or b"")
    connection.hset(Job.key_for(request_id), "stuck_since_ms", noted_ms - 6000)
    streams.sweep([BASE])
    assert connection.exists(f"{LIST}:intermediate") == 0
    assert [claimed.held.request_id for claimed in claim(streams)] == [request_id]


def test_a_note_of_an_earlier_time_that_a_request_was_taken_does_not_count(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams
) -> None:
    request_id = api.enqueue(make_request())
    connection.lmove(LIST, f"{LIST}:intermediate")
    connection.hset(Job.key_for(request_id), "stuck_since_ms", 1)
    streams.sweep([BASE])
    assert connection.lrange(f"{LIST}:intermediate", 0, -1) == [request_id.encode()]


def test_a_job_that_a_stock_worker_began_stays_with_it(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams
) -> None:
    request_id = api.enqueue(make_request())
    connection.lmove(LIST, f"{LIST}:intermediate")
    connection.hset(Job.key_for(request_id), mapping={"status": "started"})
    streams.sweep([BASE])
    assert connection.lrange(f"{LIST}:intermediate", 0, -1) == [request_id.encode()]


def test_a_request_that_is_taken_again_and_again_is_given_up(
    connection: redis.Redis, api: BlockingApi
) -> None:
    request_id = api.enqueue(make_request())
    for _ in range(MAX_NUM_TAKEN):
        take(connection)
        assert api.take_back(request_id) == "queued"
    take(connection)
    assert api.take_back(request_id) == "taken"
    assert connection.llen(LIST) == 0


def test_a_request_goes_back_to_its_place_before_younger_ones(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams
) -> None:
    first = api.enqueue(make_request())
    take(connection)
    second = api.enqueue(make_request())
    assert api.take_back(first) == "queued"
    assert [claimed.held.request_id for claimed in claim(streams, 2)] == [first, second]


def test_requests_that_wait_run_have_ended_or_are_unknown_are_not_taken_back(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams
) -> None:
    request_id = api.enqueue(make_request())
    assert api.take_back(request_id) == "other"
    (claimed,) = claim(streams)
    assert api.take_back(request_id) == "other"
    streams.append([claimed.held], [last(claimed, 0)])
    assert api.take_back(request_id) == "other"
    assert api.take_back("chatcmpl-unknown") == "other"
    assert connection.llen(LIST) == 0


def test_overdue_requests_end_without_any_worker_and_leave_their_queue(
    connection: redis.Redis, api: BlockingApi
) -> None:
    requests = [make_request("a", wait_limit_s=100, detached=detached) for detached in (True, False) * 10]
    ids = [api.enqueue(request) for request in requests]
    fresh = api.enqueue(make_request("a", wait_limit_s=100))
    pass_deadline(connection, *ids)
    assert sorted(api.end_overdue(5)) == sorted(ids)
    for request_id in ids:
        event = decode_event(connection.lindex(keys.log(request_id), -1))
        assert (event.error.code, event.finish_reason) == ("queue_timeout", "error")
        assert connection.ttl(Job.key_for(request_id)) > 0
    assert connection.lrange(f"{LIST}-a", 0, -1) == [fresh.encode()]
    assert connection.zcard(keys.order(f"{BASE}-a")) == 1


def test_an_overdue_request_behind_one_without_a_limit_ends_too(
    connection: redis.Redis, api: BlockingApi
) -> None:
    unlimited, overdue = api.enqueue(make_request()), api.enqueue(make_request(wait_limit_s=100))
    pass_deadline(connection, overdue)
    assert api.end_overdue(5) == [overdue]
    assert connection.lrange(LIST, 0, -1) == [unlimited.encode()]


def test_only_one_api_process_at_a_time_ends_overdue_requests(
    connection: redis.Redis, api: BlockingApi
) -> None:
    assert api.end_overdue(5) == []
    pass_deadline(connection, overdue := api.enqueue(make_request(wait_limit_s=100)))
    assert api.end_overdue(5) == []
    connection.delete(keys.OVERDUE_CHECK)
    assert api.end_overdue(5) == [overdue]


def test_jobs_of_other_programs_stay_as_they_are(connection: redis.Redis, api: BlockingApi) -> None:
    job = rq.Queue("theirs", connection=connection).enqueue("their.function")
    connection.hset(job.key, "deadline_ms", 1)
    before = connection.hgetall(job.key)
    assert api.end_overdue(5) == []
    assert api.take_back(job.id) == "other"
    assert connection.hgetall(job.key) == before
    assert connection.lrange("rq:queue:theirs", 0, -1) == [job.id.encode()]
