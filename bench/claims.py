"""Measures the CPU time of claims, in Redis and in the worker, for different numbers of waiting queues.

`python -m bench.claims` starts its own Redis server and prints a table. The worker is nearly full: it has 32
resident adapters, runs one sequence for each of 31, and can hold one more. Requests wait for these adapters
and for other ones. CPU time is measured, because wall time would depend on the machine's other programs.
"""

import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import msgspec
import redis
import redis.asyncio

from lorelay.embedded import StateFolder, answers, find_binary
from shared.messages import GenerationRequest, SamplingParams
from shared.queue import keys
from shared.queue.api_streams import ApiStreams, QueueLimits
from shared.queue.names import queue_name
from shared.queue.order import Pick, Running, WaitingOrder
from shared.queue.places import place_of
from shared.queue.records import Held
from shared.queue.slot_plan import AdapterSlots
from shared.queue.worker_streams import WorkerStreams

BASE = "bench"
NUM_SLOTS = 32
NUM_QUEUES = 5
NUM_CLAIMS = 1_000
NUMS_OF_QUEUES = (1, 10, 100, 1_000, 10_000)
NUM_PER_QUEUE = 4


class Costs(NamedTuple):
    """CPU time of one claim, in milliseconds."""

    look_ms: float
    """CPU time in Redis for reading the requests that the worker may choose from."""
    claim_ms: float
    """CPU time in Redis for taking a request."""
    worker_ms: float
    """CPU time in the worker for the whole claim."""


@contextmanager
def own_server() -> Iterator[str]:
    """Runs a Redis server until the context ends; yields its URL."""
    with tempfile.TemporaryDirectory(prefix="lorelay-bench-") as name, StateFolder(Path(name)) as folder:
        process = subprocess.Popen(folder.command(find_binary()), stdout=subprocess.DEVNULL)
        try:
            while not answers(folder.url):
                time.sleep(0.01)
            yield folder.url
        finally:
            process.terminate()
            process.wait()


async def _enqueue(url: str, request: GenerationRequest) -> None:
    async with redis.asyncio.Redis.from_url(url) as connection:
        await ApiStreams(connection, keys.events_channel("bench")).enqueue(
            request,
            limits=QueueLimits(1 << 30, 1 << 30, 1 << 40),
            stream_ttl_s=3600,
            result_ttl_s=60,
            failure_ttl_s=60,
        )


def fill(url: str, connection: redis.Redis, num_queues: int) -> list[str]:
    """Puts `NUM_PER_QUEUE` copies of a request into each of `num_queues` queues; returns their names."""
    request = GenerationRequest(
        f"chatcmpl-{uuid4().hex}", "a", BASE, SamplingParams(), messages=[{"role": "user"}], adapter_name="a"
    )
    asyncio.run(_enqueue(url, request))
    job = connection.dump(f"rq:job:{request.request_id}") or b""
    queues = [queue_name(BASE, f"a{number}") for number in range(num_queues)]
    pipeline = connection.pipeline(transaction=False)
    pipeline.delete(f"rq:queue:{queue_name(BASE, 'a')}", keys.order(queue_name(BASE, "a")))
    pipeline.zrem(keys.waiting(BASE), queue_name(BASE, "a"))
    for number, queue in enumerate(queues * NUM_PER_QUEUE):
        request_id = f"chatcmpl-{number:032d}"
        pipeline.restore(f"rq:job:{request_id}", 0, job)
        copy = msgspec.structs.replace(request, request_id=request_id, adapter_name=f"a{number % num_queues}")
        pipeline.hset(f"rq:job:{request_id}", mapping={"origin": queue, "request": copy.encode()})
        pipeline.hdel(f"rq:job:{request_id}", "place")
        pipeline.rpush(f"rq:queue:{queue}", request_id)
        pipeline.zadd(keys.waiting(BASE), {queue: number}, nx=True)
    pipeline.execute()
    return queues


def measure(connection: redis.Redis, streams: WorkerStreams, queues: list[str]) -> Costs:
    """Makes a series of claims and returns the mean costs of one claim."""
    order = WaitingOrder(BASE, max_wait_s=1.0)
    resident = queues[:NUM_SLOTS]
    running = Running(1, dict.fromkeys(resident[:-1], 1), {})

    held: list[Held] = []

    def look() -> list[Pick]:
        waiting, now_ms = streams.look(
            order.rank_by_share(running, resident), [], num_queues=NUM_QUEUES, num_requests=running.num_free
        )
        return order.choose(waiting, running, AdapterSlots(NUM_SLOTS, resident), now_ms)

    def claim() -> None:
        picks = look()
        for claimed in streams.claim([uuid4().hex for _ in picks], picks):
            request = claimed.request
            order.charge(queue_name(BASE, request.adapter_name), place_of(request))
            held.append(claimed.held)

    look_ms, _ = _cpu_ms(connection, look, NUM_CLAIMS)
    parts = []
    for _ in range(NUM_CLAIMS // NUM_SLOTS):
        parts.append(_cpu_ms(connection, claim, min(NUM_SLOTS, len(queues) * NUM_PER_QUEUE)))
        streams.hand_back(held)
        held.clear()
    both_ms, worker_ms = (statistics.median(part) for part in zip(*parts, strict=True))
    return Costs(look_ms, both_ms - look_ms, worker_ms)


def _cpu_ms(connection: redis.Redis, call: Callable[[], object], num_calls: int) -> tuple[float, float]:
    """Returns the CPU time per call, in ms: of Redis, and of this thread."""
    server_s, own_s = _server_cpu_s(connection), time.thread_time()
    for _ in range(num_calls):
        call()
    own_s = time.thread_time() - own_s
    return 1000 * (_server_cpu_s(connection) - server_s) / num_calls, 1000 * own_s / num_calls


def _server_cpu_s(connection: redis.Redis) -> float:
    cpu = connection.info("cpu")
    return float(cpu["used_cpu_user_main_thread"]) + float(cpu["used_cpu_sys_main_thread"])


def main() -> None:
    """Measures each number of queues and prints the table."""
    sys.stdout.write(
        "| queues that wait | look: Redis ms | claim: Redis ms | both: worker ms |\n|---|---|---|---|\n"
    )
    with own_server() as url, redis.Redis.from_url(url) as connection:
        for num_queues in NUMS_OF_QUEUES:
            connection.flushall()
            queues = fill(url, connection, num_queues)
            streams = WorkerStreams(
                connection,
                base=BASE,
                worker_name="bench",
                lease_s=60,
                stream_ttl_s=60,
                result_ttl_s=60,
                failure_ttl_s=60,
            )
            streams.serve(dict.fromkeys(queues, ""))
            streams.sweep(queues)
            cells = [f"{cost:.2f}" for cost in measure(connection, streams, queues)]
            sys.stdout.write(f"| {num_queues} | {' | '.join(cells)} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
