"""The two ends of the queue and the token log: `ApiStreams` (asyncio) and `WorkerStreams` (blocking).

Both only call the scripts in `shared/scripts/`. Each script is atomic and can be repeated safely: redis-py
repeats a call whose reply it lost.
"""

import base64
import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

import msgspec
import redis
import redis.asyncio
from rq.defaults import RQ_KEY_PREFIX
from rq.job import Job

from shared import keys
from shared.errors import (
    GenerationFailed,
    GenerationStopped,
    LorelayError,
    QueueFull,
    RequestNotFound,
    from_info,
)
from shared.jobs import job_fields
from shared.messages import (
    SCHEMA_VERSION,
    FinishReason,
    GenerationRequest,
    StreamEvent,
    decode_event,
    decode_request,
)
from shared.queues import queue_name, slug

_pack = msgspec.msgpack.encode
"""For the scripts' `cmsgpack`, which reads strings but no binary type."""


@cache
def script_source(name: str) -> str:
    """The text of `shared/scripts/<name>.lua` behind the prelude, on RQ's key prefix."""
    folder = resources.files("shared") / "scripts"
    prelude = (folder / "prelude.lua").read_text().replace("@RQ@", RQ_KEY_PREFIX)
    return prelude + (folder / f"{name}.lua").read_text()


class Held(NamedTuple):
    """A request that a worker believes it owns, under the execution of its claim."""

    request_id: str
    execution_id: str


class Claim(NamedTuple):
    """A request handed to a worker: what to run, and what its log holds already."""

    held: Held
    request: GenerationRequest
    events: tuple[StreamEvent, ...]
    alone: bool = False
    """It was near crashes: its steps must run without company until it is cleared."""


class Slots(NamedTuple):
    """Where the adapters that run find room on a worker."""

    num: int
    resident: Sequence[str]
    """Queues whose adapters have a slot now, in use or not."""
    max_wait_s: float
    """How long the head of a queue waits at most before its adapter may push another out."""


UNLIMITED_SLOTS = Slots(1 << 30, (), 1.0)


class Append(NamedTuple):
    """One event for one request's log."""

    held: Held
    event: StreamEvent
    meta: Mapping[str, Any] | None = None
    """With the terminal event: what `job.meta` shows (usage, timings, adapter; never text)."""


class News(NamedTuple):
    """What the scripts tell a worker about the requests it named."""

    aborted: list[str]
    lost: list[str]
    in_time: bool = True
    """Whether the worker's own lease had held until it was renewed."""


class FoundRequest(NamedTuple):
    """A request that was enqueued before, and how far it is."""

    request: GenerationRequest
    num_events: int
    has_ended: bool


class Reaped(NamedTuple):
    """Requests whose worker was lost: back on their queues, or dead-lettered."""

    requeued: list[str]
    dead: list[str]


MAX_RETRY_AFTER_S = 60
NUM_PLACES_TO_AWAIT = 5
NUM_EVENTS_TO_CLEAR = 16
"""A request that ran on for so many events since its claim is cleared of the crashes it was near."""
NUM_QUEUES_PER_SWEEP = 100
MAX_NUM_REAPED = 1000
"""Requests that one call of `reap` takes from their workers."""


class ApiStreams:
    """The API's end: enqueue, abort, read the log."""

    def __init__(self, connection: redis.asyncio.Redis, channel: str) -> None:
        self._connection = connection
        self._channel = channel
        self._enqueue = connection.register_script(script_source("enqueue"))
        self._abort = connection.register_script(script_source("abort"))

    async def enqueue(
        self,
        request: GenerationRequest,
        *,
        max_queue_depth: int,
        max_total_queue_depth: int,
        stream_ttl_s: float,
        result_ttl_s: int,
        failure_ttl_s: int,
        client: str = "",
    ) -> None:
        """Admits a request and puts it on its queue, in one step.

        `client` is who may resume or abort it later: a digest of the API key.

        Raises:
            QueueFull: the queue, or all queues of the base together, are at their limit.
        """
        queue = queue_name(request.base, request.adapter_name)
        fields = job_fields(request, queue, client, result_ttl_s, failure_ttl_s)
        flat = [item for field in fields.items() for item in field]
        reply = await self._enqueue(
            args=[
                request.request_id,
                slug(request.base),
                queue,
                max_queue_depth,
                max_total_queue_depth,
                self._channel,
                int(stream_ttl_s * 1000),
                *flat,
            ]
        )
        if reply[0] == b"full":
            raise QueueFull(
                f"{reply[1]} requests are waiting already; try again later.",
                retry_after_s=_retry_after_s(num_drained_per_minute=reply[2]),
            )

    async def abort(self, request_id: str, *, only_queued: bool = False, ttl_s: int = 60) -> str:
        """Gives a request up: `queued` (removed, never runs), `running` (its worker is told) or `gone`."""
        reply = await self._abort(args=[request_id, int(only_queued), ttl_s])
        return reply.decode()  # type: ignore[no-any-return]

    async def find_request(self, request_id: str, client: str) -> FoundRequest:
        """A request that this client sent, while its job is kept.

        Raises:
            RequestNotFound: there is none of this id, or another client sent it.
        """
        pipeline = self._connection.pipeline()
        pipeline.hmget(Job.key_for(request_id), ["request", "client", "has_ended"])
        pipeline.llen(keys.log(request_id))
        (encoded, sender, has_ended), num_events = await pipeline.execute()
        if encoded is None or sender != client.encode():
            raise RequestNotFound
        return FoundRequest(decode_request(encoded), num_events, has_ended is not None)

    async def attach(self, request_id: str, stream_ttl_s: float) -> None:
        """From now on this API is told of a request's events, and no other."""
        await self._connection.set(keys.reader(request_id), self._channel, px=int(stream_ttl_s * 1000))

    async def renew_lease(self, lease_s: float) -> None:
        """Tells the workers that this API reads on for `lease_s`."""
        await self._connection.set(self._channel, 1, px=int(lease_s * 1000))

    async def find_vanished(self, request_ids: Sequence[str]) -> list[str]:
        """Those requests whose job is gone, or was canceled in its queue."""
        pipeline = self._connection.pipeline(transaction=False)
        for request_id in request_ids:
            pipeline.hget(Job.key_for(request_id), "status")
        statuses = await pipeline.execute()
        return [
            request_id
            for request_id, status in zip(request_ids, statuses, strict=True)
            if status in (None, b"canceled")
        ]

    async def read_logs(
        self, positions: Sequence[tuple[str, int]], *, max_num_events: int
    ) -> list[list[StreamEvent]]:
        """The events of each (request id, first event_no) in the logs now, at most so many of each."""
        pipeline = self._connection.pipeline(transaction=False)
        for request_id, first in positions:
            pipeline.lrange(keys.log(request_id), first, first + max_num_events - 1)
        return [[decode_event(entry) for entry in entries] for entries in await pipeline.execute()]


class WorkerStreams:
    """One worker's end: claim, append, renew, hand back, reap."""

    def __init__(
        self,
        connection: redis.Redis,
        *,
        base: str,
        worker_name: str,
        lease_s: float,
        stream_ttl_s: float,
        result_ttl_s: int,
        failure_ttl_s: int,
    ) -> None:
        self._connection = connection
        self._base = slug(base)
        self._worker_name = worker_name
        self._lease_ms = int(lease_s * 1000)
        self._stream_ttl_ms = int(stream_ttl_s * 1000)
        self._result_ttl_s = result_ttl_s
        self._failure_ttl_s = failure_ttl_s
        self._closed: list[str] = []
        """Queues that get no more requests until their slots are free."""
        self._claim = connection.register_script(script_source("claim"))
        self._append = connection.register_script(script_source("append"))
        self._renew = connection.register_script(script_source("renew"))
        self._hand_back = connection.register_script(script_source("hand_back"))
        self._reap = connection.register_script(script_source("reap"))
        self._sweep = connection.register_script(script_source("sweep"))

    def claim(
        self,
        execution_ids: Sequence[str],
        running: Mapping[str, int],
        queues: Sequence[str],
        slots: Slots = UNLIMITED_SLOTS,
    ) -> list[Claim]:
        """Claims at most one request per execution id.

        `running` counts this worker's requests per queue; `queues` are those it serves.
        """
        claimed, closed = self._claim(
            args=[
                self._base,
                self._worker_name,
                len(execution_ids),
                self._lease_ms,
                self._stream_ttl_ms,
                SCHEMA_VERSION,
                json.dumps(running),
                json.dumps(list(queues)),
                self._pack_slots(slots),
                *execution_ids,
            ]
        )
        self._closed = [queue.decode() for queue in closed]
        return [
            Claim(
                Held(request_id.decode(), execution_id.decode()),
                decode_request(request),
                tuple(decode_event(entry) for entry in log),
                bool(alone),
            )
            for request_id, execution_id, request, log, alone in claimed
        ]

    def append(self, held: Iterable[Held], appends: Iterable[Append], isolated: str = "") -> News:
        """Writes events to the logs and publishes them; a terminal event ends its job in the same step.

        `isolated`: the request whose steps run alone from now on, so that a crash is charged to it.
        """
        packed = [
            (
                *append.held,
                append.event.event_no,
                append.event.encode().decode(),
                self._outcome(append) if append.event.is_terminal else None,
            )
            for append in appends
        ]
        reply = self._append(
            args=[
                self._worker_name,
                self._lease_ms,
                self._stream_ttl_ms,
                _pack_held(held),
                _pack(packed),
                NUM_EVENTS_TO_CLEAR,
                isolated,
            ]
        )
        return _news(reply)

    def renew(self, held: Iterable[Held], *, judge_readers: bool = False) -> News:
        """Extends this worker's own entry and the leases of all it holds.

        `judge_readers`: a request whose API let its lease run out counts as aborted, unless it is detached;
        none does if this worker's own lease had run out.
        """
        reply = self._renew(
            args=[
                self._base,
                self._worker_name,
                self._lease_ms,
                _pack_held(held),
                int(judge_readers),
            ]
        )
        return _news(reply)

    def hand_back(self, held: Sequence[Held]) -> int:
        """Returns requests (`held`: oldest first) to the front of their queues; how many were still owned."""
        return int(self._hand_back(args=[_pack_held(reversed(held))]))

    def reap(self, max_crashes_alone: int = 3) -> Reaped:
        """Puts requests with an expired lease back on their queues; nothing if its own lease has run out.

        One that had no company when it lost its worker, so many times, ends as failed instead.
        """
        reason = GenerationFailed(f"The request crashed its worker {max_crashes_alone} times.")
        event = StreamEvent(event_no=-1, finish_reason=FinishReason.ERROR, error=reason.to_info())
        requeued, dead = self._reap(
            args=[
                self._base,
                MAX_NUM_REAPED,
                max_crashes_alone,
                self._failure_ttl_s,
                event.encode().decode().replace("%", "%%").replace('"event_no":-1', '"event_no":%d'),
                _exception_text(reason),
                self._worker_name,
            ]
        )
        return Reaped([item.decode() for item in requeued], [item.decode() for item in dead])

    def sweep(self, queues: Iterable[str]) -> int:
        """Notices what was put on these queues, or taken from them, by others; how many of them wait."""
        names = list(queues)
        # In parts, so that nobody waits long for the server meanwhile: it takes 10 us a queue.
        starts = range(0, len(names), NUM_QUEUES_PER_SWEEP)
        parts = [names[start : start + NUM_QUEUES_PER_SWEEP] for start in starts]
        return sum(int(self._sweep(args=[self._base, *part])) for part in parts)

    def wait_for_doorbell(self, timeout_s: float) -> bool:
        """Blocks until a request is enqueued for the base, at most `timeout_s`; whether one was."""
        return self._connection.blpop([keys.doorbell(self._base)], timeout=timeout_s) is not None

    def _pack_slots(self, slots: Slots) -> str:
        return json.dumps(
            {
                "num": slots.num,
                "resident": list(slots.resident),
                "closed": self._closed,
                "max_wait_ms": int(slots.max_wait_s * 1000),
            }
        )

    def _outcome(self, append: Append) -> tuple[str, str, str, str, int]:
        """What `append.lua` ends the job with; result and exception encoded as in `rq.results.Result`."""
        event, meta = append.event, json.dumps(dict(append.meta or {}))
        if event.error is not None:
            error = from_info(event.error)
            status = "stopped" if isinstance(error, GenerationStopped) else "failed"
            return status, meta, "", _exception_text(error), self._failure_ttl_s
        status = "canceled" if event.finish_reason == "abort" else "finished"
        return status, meta, base64.b64encode(meta.encode()).decode(), "", self._result_ttl_s


def _retry_after_s(num_drained_per_minute: int) -> int:
    """When a client of a full queue should come back: when a few places will be free, within a minute."""
    if num_drained_per_minute == 0:
        return MAX_RETRY_AFTER_S
    seconds_per_place = 60 / num_drained_per_minute
    return max(1, min(MAX_RETRY_AFTER_S, math.ceil(NUM_PLACES_TO_AWAIT * seconds_per_place)))


def _exception_text(error: LorelayError) -> str:
    """An error as RQ's results store exceptions."""
    return base64.b64encode(zlib.compress(f"{error.code}: {error.message}".encode())).decode()


def _pack_held(held: Iterable[Held]) -> bytes:
    return _pack([item for pair in held for item in pair])


def _news(reply: list[Any]) -> News:
    aborted, lost, *in_time = reply
    return News([item.decode() for item in aborted], [item.decode() for item in lost], in_time != [0])
