"""Two at once at the same script, forty times: without a model, straight at the server."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import redis

from shared.queue import keys
from tests.redis_server import RedisServer
from tests.streams import BASE, BlockingApi, claim, make_request, reaper, worker_streams
from tests.waiting import wait_until

NUM_TRIALS = 40
T = TypeVar("T")


def at_once(first: Callable[[], T], second: Callable[[], T]) -> tuple[T, T]:
    """Both results of two calls that begin together."""
    barrier = threading.Barrier(2)

    def call(function: Callable[[], T]) -> T:
        barrier.wait()
        return function()

    with ThreadPoolExecutor(2) as pool:
        one, two = pool.submit(call, first), pool.submit(call, second)
        return one.result(), two.result()


def test_the_same_request_pushed_twice_at_once_is_queued_once(
    redis_server: RedisServer, connection: redis.Redis
) -> None:
    for _ in range(NUM_TRIALS):
        request = make_request()
        at_once(
            lambda request=request: BlockingApi(redis_server.url).enqueue(request),
            lambda request=request: BlockingApi(redis_server.url).enqueue(request),
        )
        assert connection.lrange(f"rq:queue:{BASE}", 0, -1) == [request.request_id.encode()]
        worker = worker_streams(connection)
        assert [claimed.held.request_id for claimed in claim(worker, 2)] == [request.request_id]


def test_two_reapers_at_once_requeue_a_lost_request_once(
    redis_server: RedisServer, connection: redis.Redis
) -> None:
    api = BlockingApi(redis_server.url)
    with redis.Redis.from_url(redis_server.url) as other:
        for trial in range(NUM_TRIALS):
            request_id = api.enqueue(make_request())
            claim(worker_streams(connection, f"lost-{trial}", lease_s=0.001))
            wait_until(lambda: connection.zcount(keys.leases(BASE), "-inf", "+inf") == 1, what="the lease")
            wait_until(lambda: _is_expired(connection), what="the end of the lease")
            reapers = reaper(connection, "r1"), reaper(other, "r2")
            results = at_once(reapers[0].reap, reapers[1].reap)
            assert sorted(len(result.requeued) for result in results) == [0, 1]
            assert connection.lrange(f"rq:queue:{BASE}", 0, -1) == [request_id.encode()]
            connection.flushall()


def test_two_workers_at_once_never_claim_the_same_request(
    redis_server: RedisServer, connection: redis.Redis
) -> None:
    api = BlockingApi(redis_server.url)
    with redis.Redis.from_url(redis_server.url) as other:
        workers = worker_streams(connection, "w1"), worker_streams(other, "w2")
        for _ in range(NUM_TRIALS):
            ids = {api.enqueue(make_request()) for _ in range(3)}
            claims = at_once(lambda: claim(workers[0], 2), lambda: claim(workers[1], 2))
            claimed = [item.held.request_id for group in claims for item in group]
            assert len(claimed) == 3
            assert set(claimed) == ids


def _is_expired(connection: redis.Redis) -> bool:
    seconds, micros = connection.time()
    return connection.zcount(keys.leases(BASE), "-inf", seconds * 1000 + micros // 1000) == 1
