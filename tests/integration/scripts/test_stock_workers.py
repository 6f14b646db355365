"""A stock worker of RQ takes a request and is stopped, dies, or writes late, at every place in between."""

import time
from collections.abc import Callable

import pytest
import redis
from rq import Queue, SimpleWorker
from rq.job import Job
from rq.registry import FailedJobRegistry, StartedJobRegistry
from rq.serializers import JSONSerializer

from shared.messages import decode_event
from shared.queue import keys
from shared.queue.worker_streams import WorkerStreams
from tests.streams import BASE, BlockingApi, claim, last, make_request, reaper, token, worker_streams
from tests.waiting import wait_until

LIST = f"rq:queue:{BASE}"
LONGER_THAN_STUCK_MS = 6000


class StockWorker:
    """RQ's own worker, one step at a time."""

    def __init__(self, connection: redis.Redis, *names: str) -> None:
        """`names`: its queues. With several of them, RQ keeps no list of the jobs that it has popped."""
        self._connection = connection
        self._queues = [
            Queue(name, connection=connection, serializer=JSONSerializer) for name in names or (BASE,)
        ]
        self._worker = SimpleWorker(self._queues, connection=connection, serializer=JSONSerializer)
        self._job: Job

    def pop(self) -> None:
        """Moves a job off its queue."""
        popped = Queue.dequeue_any(self._queues, None, self._connection, serializer=JSONSerializer)
        assert popped is not None
        self._job, _ = popped

    def register(self) -> None:
        """Pops a job, and writes the record of its execution."""
        self.pop()
        self._execution = self._worker.prepare_execution(self._job)

    def begin(self) -> None:
        """Goes on to mark the job as started."""
        self.register()
        self.begin_late()

    def begin_late(self) -> None:
        """Marks the job as started, whatever has become of it."""
        self._worker.prepare_job_execution(self._job, remove_from_intermediate_queue=len(self._queues) == 1)

    def fail_late(self) -> None:
        """Marks the job as started, and ends it as failed."""
        self.begin_late()
        self._worker.handle_job_failure(self._job, self._queues[0], execution=self._execution)

    def fail(self) -> None:
        """Does all of this."""
        self.register()
        self.fail_late()


@pytest.fixture
def streams(connection: redis.Redis) -> WorkerStreams:
    return worker_streams(connection)


@pytest.fixture
def stock(connection: redis.Redis) -> StockWorker:
    return StockWorker(connection)


def sweep_until_stuck(connection: redis.Redis, streams: WorkerStreams, request_id: str) -> None:
    """Sweeps, lets `LONGER_THAN_STUCK_MS` pass, and sweeps again."""
    streams.sweep([BASE])
    noted_ms = float(connection.hget(Job.key_for(request_id), "stuck_since_ms") or b"")
    connection.hset(Job.key_for(request_id), "stuck_since_ms", noted_ms - LONGER_THAN_STUCK_MS)
    streams.sweep([BASE])


def claimed_ids(streams: WorkerStreams) -> list[str]:
    return [claimed.held.request_id for claimed in claim(streams)]


def remains(connection: redis.Redis) -> list[bytes]:
    """Lists what a stock worker leaves in RQ's lists and registries."""
    lists = (f"{LIST}:intermediate", f"rq:wip:{BASE}", f"rq:failed:{BASE}")
    return [name for pattern in lists for name in connection.keys(pattern)]


def test_a_taken_request_stays_until_its_clients_limit_however_soon_failed_jobs_expire(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams, stock: StockWorker
) -> None:
    request_id = api.enqueue(make_request(), failure_ttl_s=1, stream_ttl_s=60)
    stock.fail()
    assert connection.ttl(Job.key_for(request_id)) >= 59
    assert api.take_back(request_id) == "queued"
    assert claimed_ids(streams) == [request_id]


@pytest.mark.parametrize("end", ["overdue", "unreadable"])
def test_a_request_that_a_script_ends_as_failed_stays_as_long_as_failed_jobs_do(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams, end: str
) -> None:
    request_id = api.enqueue(make_request(wait_limit_s=100), failure_ttl_s=5, stream_ttl_s=60)
    field = {"overdue": "deadline_ms", "unreadable": "schema_version"}[end]
    connection.hset(Job.key_for(request_id), field, 1 if end == "overdue" else "garbage")
    assert claim(streams) == []
    assert decode_event(connection.lindex(keys.log(request_id), -1)).is_terminal
    assert 0 < connection.ttl(Job.key_for(request_id)) <= 5


@pytest.mark.parametrize(
    "stop_after", [StockWorker.pop, StockWorker.register, StockWorker.begin], ids=lambda step: step.__name__
)
def test_a_request_whose_stock_worker_died_goes_back(
    connection: redis.Redis,
    api: BlockingApi,
    streams: WorkerStreams,
    stock: StockWorker,
    stop_after: Callable[[StockWorker], None],
) -> None:
    request_id = api.enqueue(make_request())
    stop_after(stock)
    streams.sweep([BASE])
    assert claim(streams) == []
    sweep_until_stuck(connection, streams, request_id)
    assert remains(connection) == []
    assert claimed_ids(streams) == [request_id]


def test_a_request_whose_stock_worker_of_several_queues_died_goes_back(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams
) -> None:
    request_id = api.enqueue(make_request())
    StockWorker(connection, BASE, f"{BASE}-a").register()
    sweep_until_stuck(connection, streams, request_id)
    assert claimed_ids(streams) == [request_id]


def test_a_stream_whose_request_a_dead_stock_worker_has_begun_continues_after_its_last_event(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams, stock: StockWorker
) -> None:
    request_id = api.enqueue(make_request())
    (claimed,) = claim(streams)
    streams.append([claimed.held], [token(claimed, 0)])
    streams.hand_back([claimed.held])
    stock.begin()
    sweep_until_stuck(connection, streams, request_id)
    (again,) = claim(streams)
    assert [event.event_no for event in again.events] == [0]


@pytest.mark.parametrize("is_begun", [False, True])
def test_an_entry_of_a_request_that_is_canceled_meanwhile_is_removed(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams, stock: StockWorker, is_begun: bool
) -> None:
    request_id = api.enqueue(make_request())
    stock.register()
    assert api.abort(request_id) == "queued"
    if is_begun:
        stock.begin_late()
    assert streams.sweep([BASE]) == 0
    assert remains(connection) == []


def test_a_request_that_a_stock_worker_begins_after_its_end_does_not_run_again(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams, stock: StockWorker
) -> None:
    request_id = api.enqueue(make_request())
    stock.register()
    sweep_until_stuck(connection, streams, request_id)
    (claimed,) = claim(streams)
    streams.append([claimed.held], [last(claimed, 0)])
    connection.zadd(f"rq:wip:{BASE}", {f"{request_id}:stock": time.time() + 60})
    stock.begin_late()
    assert streams.sweep([BASE]) == 0
    assert remains(connection) == []


@pytest.mark.parametrize("late", ["begin_late", "fail_late"])
def test_a_stock_worker_that_writes_late_changes_nothing_for_a_request_that_runs(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams, stock: StockWorker, late: str
) -> None:
    request_id = api.enqueue(make_request())
    stock.register()
    sweep_until_stuck(connection, streams, request_id)
    (claimed,) = claim(streams)
    getattr(stock, late)()
    assert api.take_back(request_id) == "other"
    assert api.abort(request_id, only_queued=True) == "running"
    streams.sweep([BASE])
    streams.append([claimed.held], [token(claimed, 0)])
    assert api.abort(request_id) == "running"
    assert streams.append([claimed.held], []).aborted == [request_id]
    streams.append([claimed.held], [last(claimed, 1)])
    events = [decode_event(entry) for entry in connection.lrange(keys.log(request_id), 0, -1)]
    assert [event.is_terminal for event in events] == [False, True]
    assert Job.fetch(request_id, connection, JSONSerializer).get_status() == "finished"


@pytest.mark.parametrize("way", ["reap", "hand back"])
def test_a_request_that_a_stock_worker_failed_late_outlives_its_worker(
    connection: redis.Redis, api: BlockingApi, stock: StockWorker, way: str
) -> None:
    request_id = api.enqueue(make_request())
    streams = worker_streams(connection, lease_s=0.001)
    stock.register()
    sweep_until_stuck(connection, streams, request_id)
    (claimed,) = claim(streams)
    stock.fail_late()
    if way == "hand back":
        streams.hand_back([claimed.held])
    else:
        wait_until(lambda: reaper(connection).reap().requeued == [request_id])
    assert connection.ttl(Job.key_for(request_id)) == -1
    assert remains(connection) == []
    assert claimed_ids(streams) == [request_id]


@pytest.mark.parametrize("late", ["begin_late", "fail_late"])
@pytest.mark.parametrize("meets_it", ["claim", "sweep", "abort of another", "look at another"])
def test_a_stock_worker_that_writes_late_changes_nothing_for_a_request_that_waits(
    connection: redis.Redis,
    api: BlockingApi,
    streams: WorkerStreams,
    stock: StockWorker,
    late: str,
    meets_it: str,
) -> None:
    request_id = api.enqueue(make_request())
    stock.register()
    sweep_until_stuck(connection, streams, request_id)
    other = api.enqueue(make_request())
    getattr(stock, late)()
    if meets_it == "sweep":
        streams.sweep([BASE])
    elif meets_it == "abort of another":
        assert api.abort(other) == "queued"
    elif meets_it == "look at another":
        connection.zrem(keys.order(BASE), connection.hget(Job.key_for(request_id), "place") or b"")
    claims = claim(streams, 2)
    expected = {request_id} if meets_it == "abort of another" else {request_id, other}
    assert {claimed.held.request_id for claimed in claims} == expected
    assert connection.ttl(Job.key_for(request_id)) == -1


def test_a_taken_request_whose_time_in_the_queue_is_over_is_removed_as_one_that_waits(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams, stock: StockWorker
) -> None:
    ids = [api.enqueue(make_request()) for _ in range(2)]
    stock.fail()
    stock.begin()
    for request_id in ids:
        assert api.abort(request_id, only_queued=True) == "queued"
    stock.fail_late()
    assert [api.take_back(request_id) for request_id in ids] == ["other", "other"]
    sweep_twice = [streams.sweep([BASE]) for _ in range(2)]
    assert sweep_twice == [0, 0]
    assert claim(streams) == []
    assert connection.exists(*(keys.reader(request_id) for request_id in ids)) == 0


def test_an_abort_whose_reply_was_lost_is_answered_again_as_before(
    connection: redis.Redis, api: BlockingApi
) -> None:
    request_id = api.enqueue(make_request())
    assert [api.abort(request_id, only_queued=True) for _ in range(2)] == ["queued", "queued"]
    assert connection.zcard(keys.order(BASE)) == 0


def test_rqs_cleaners_of_a_stock_workers_lost_execution_change_nothing_for_a_running_request(
    connection: redis.Redis, api: BlockingApi, streams: WorkerStreams, stock: StockWorker
) -> None:
    request_id = api.enqueue(make_request())
    stock.register()
    (entry,) = connection.zrange(f"rq:wip:{BASE}", 0, -1)
    sweep_until_stuck(connection, streams, request_id)
    (claimed,) = claim(streams)
    connection.zadd(f"rq:wip:{BASE}", {entry: 1})
    StartedJobRegistry(BASE, connection, serializer=JSONSerializer).cleanup()
    assert request_id in FailedJobRegistry(BASE, connection, serializer=JSONSerializer)
    assert api.abort(request_id, only_queued=True) == "running"
    assert streams.append([claimed.held], [last(claimed, 0)]).lost == []
    assert Job.fetch(request_id, connection, JSONSerializer).get_status() == "finished"
