"""Both ends of the queue for tests: requests, an API's end that blocks, a worker's end."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar
from uuid import uuid4

import redis
import redis.asyncio

from shared.errors import GenerationFailed
from shared.messages import GenerationRequest, SamplingParams, StreamEvent, Usage
from shared.queue.api_streams import ApiStreams, QueueLimits
from shared.queue.order import Pick, Running, WaitingOrder
from shared.queue.records import Append, Claim
from shared.queue.slot_plan import AdapterSlots
from shared.queue.worker_streams import WorkerStreams
from worker.serving.claimer import Claimer
from worker.serving.consumer import Consumer, HeldRequests

Result = TypeVar("Result")
BASE = "tiny"
QUEUES = [BASE, *(f"{BASE}-{name}" for name in ("a", "b", "c", "pirate", "not-loaded"))]
"""The queues of the base and of the adapters that tests use."""
PLENTY = AdapterSlots(1 << 30, ())
CHANNEL = "lorelay:events:test"
SECRET = "the prompt that nobody may see"


def make_request(adapter_name: str | None = None, **values: Any) -> GenerationRequest:
    """A valid request with a fresh id."""
    defaults: dict[str, Any] = {
        "request_id": f"chatcmpl-{uuid4().hex}",
        "model": adapter_name or BASE,
        "base": BASE,
        "adapter_name": adapter_name,
        "messages": [{"role": "user", "content": SECRET}],
        "sampling": SamplingParams(temperature=0.0, max_tokens=8),
    }
    return GenerationRequest(**(defaults | values))


class BlockingApi:
    """`ApiStreams` for tests without asyncio."""

    def __init__(self, url: str, channel: str = CHANNEL) -> None:
        self._url = url
        self._channel = channel

    def enqueue(self, request: GenerationRequest, **limits: Any) -> str:
        """Enqueues with generous limits unless given others; returns the request id."""
        queue_limits = {"depth": 100, "total_depth": 1000, "num_bytes": 1 << 30}
        for name in QueueLimits._fields:
            if name in limits:
                queue_limits[name] = limits.pop(name)
        defaults = {
            "limits": QueueLimits(**queue_limits),
            "stream_ttl_s": 60,
            "result_ttl_s": 60,
            "failure_ttl_s": 120,
        }

        async def call() -> None:
            async with redis.asyncio.Redis.from_url(self._url) as connection:
                await ApiStreams(connection, self._channel).enqueue(request, **(defaults | limits))

        asyncio.run(call())
        return request.request_id

    def abort(self, request_id: str, **options: Any) -> str:
        """Calls `ApiStreams.abort`."""
        return self._call(lambda streams: streams.abort(request_id, **options))

    def take_back(self, request_id: str) -> str:
        """Calls `ApiStreams.take_back`."""
        return self._call(lambda streams: streams.take_back(request_id))

    def end_overdue(self, min_pause_s: float) -> list[str]:
        """Calls `ApiStreams.end_overdue`."""
        return self._call(lambda streams: streams.end_overdue(min_pause_s))

    def why_vanished(self, request_id: str) -> GenerationFailed | None:
        """The reason of `ApiStreams.find_vanished` for one request."""
        return self._call(lambda streams: streams.find_vanished([request_id])).get(request_id)

    def _call(self, work: Callable[[ApiStreams], Awaitable[Result]]) -> Result:
        async def call() -> Result:
            async with redis.asyncio.Redis.from_url(self._url) as connection:
                return await work(ApiStreams(connection, self._channel))

        return asyncio.run(call())


def worker_streams(connection: redis.Redis, name: str = "w1", **options: Any) -> WorkerStreams:
    """A worker's end with short leases; it serves any version of `QUEUES`, or of the queues given."""
    defaults = {
        "base": BASE,
        "lease_s": 4,
        "stream_ttl_s": 60,
        "result_ttl_s": 60,
        "failure_ttl_s": 120,
    }
    served = options.pop("served", QUEUES)
    streams = WorkerStreams(connection, worker_name=name, **(defaults | options))
    streams.serve(served if isinstance(served, dict) else dict.fromkeys(served, ""))
    return streams


def reaper(connection: redis.Redis, name: str = "reaper") -> WorkerStreams:
    """The end of a worker whose own lease holds, so that it may reap others."""
    streams = worker_streams(connection, name)
    streams.renew([])
    return streams


def claim(streams: WorkerStreams, num_requests: int = 1, **options: Any) -> list[Claim]:
    """Claims up to `num_requests` under fresh claim ids."""
    return claimer(streams).claim(running(num_requests, **options.get("running", {})))


def choose(streams: WorkerStreams, num_requests: int) -> list[Pick]:
    """The picks that `claim` would make."""
    waiting, now_ms = streams.look([BASE], [], num_queues=32, num_requests=num_requests)
    return WaitingOrder(BASE, max_wait_s=1.0).choose(waiting, running(num_requests), PLENTY, now_ms)


def running(num_free: int, /, **per_queue: int) -> Running:
    """The running sequences by queue, and room for more."""
    return Running(num_free, per_queue, {})


def claimer(
    streams: WorkerStreams,
    *,
    served: Sequence[str] = (),
    slots: AdapterSlots = PLENTY,
    max_wait_s: float = 1.0,
) -> Claimer:
    """A worker's claims, by an order without memory. `served` has its queues if they are few."""
    order = WaitingOrder(BASE, max_wait_s=max_wait_s)
    return Claimer(streams, order, slots=lambda: slots, names_if_few=lambda _: served)


def make_consumer(streams: WorkerStreams, held: HeldRequests, **options: Any) -> Consumer:
    """A consumer that claims by `claimer`."""
    defaults = {"capacity": lambda: 8, "poll_s": 0.02}
    return Consumer(streams, claimer(streams), held, **(defaults | options))


def token(claimed: Claim, event_no: int, text: str = "x") -> Append:
    """An ordinary event of one token."""
    return Append(claimed.held, StreamEvent(event_no=event_no, token_ids=(event_no,), text=text))


def last(claimed: Claim, event_no: int, **values: Any) -> Append:
    """A terminal event."""
    event = StreamEvent(
        event_no=event_no, **({"finish_reason": "stop", "usage": Usage(3, event_no)} | values)
    )
    return Append(claimed.held, event, {"model": claimed.request.model, "completion_tokens": event_no})
