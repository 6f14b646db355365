"""The API's end of the queue and the token log; the worker's is in `shared.queue.worker_streams`."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import redis.asyncio
from rq.job import Job

from shared.errors import GenerationFailed, QueueFull, RequestNotFound
from shared.messages import GenerationRequest, StreamEvent, decode_event
from shared.queue import keys
from shared.queue.claims import UnreadableRecord, read_request
from shared.queue.connections import is_wrong_type
from shared.queue.job_record import job_fields
from shared.queue.names import queue_name, slug
from shared.queue.scripts import script_source

MAX_RETRY_AFTER_S = 60
NUM_ENDS_TO_AWAIT = 5


class EndLost(GenerationFailed):
    """The request has ended, but its log has lost the end."""


class FoundRequest(NamedTuple):
    """A request that was enqueued before, and its progress."""

    request: GenerationRequest
    num_events: int
    has_ended: bool


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

        `client` is a digest of the API key; only the same client may resume or abort the request.

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
                math.ceil((request.wait_limit_s or 0) * 1000),
                *flat,
            ]
        )
        if reply[0] == b"full":
            raise QueueFull(
                f"{reply[1]} requests are waiting already; try again later.",
                retry_after_s=_retry_after_s(num_ended=reply[2], over_s=reply[3] / 1000),
            )

    async def abort(self, request_id: str, *, only_queued: bool = False, ttl_s: int = 60) -> str:
        """Aborts a request: `queued` (it never runs), `running` (its worker is told) or `gone`."""
        reply = await self._abort(args=[request_id, int(only_queued), ttl_s])
        return reply.decode()  # type: ignore[no-any-return]

    async def find_request(self, request_id: str, client: str) -> FoundRequest:
        """Finds a request that this client sent, as long as its job is kept.

        Raises:
            RequestNotFound: no request has this id, or another client sent it.
            UnreadableRecord: its job or its log can't be read.
        """
        pipeline = self._connection.pipeline()
        pipeline.hmget(Job.key_for(request_id), ["request", "client", "has_ended"])
        pipeline.llen(keys.log(request_id))
        job, num_events = _unless_fatal(await pipeline.execute(raise_on_error=False))
        if is_wrong_type(job) or is_wrong_type(num_events):
            raise UnreadableRecord("a key of another type")
        encoded, sender, has_ended = job
        if encoded is None or sender != client.encode():
            raise RequestNotFound
        return FoundRequest(read_request(encoded), num_events, has_ended is not None)

    async def attach(self, request_id: str, stream_ttl_s: float) -> None:
        """Makes this API the only one that gets a request's events from now on."""
        key = keys.reader(request_id)
        pipeline = self._connection.pipeline()
        # The key of a request that has ended keeps its expiry, which is that of the log.
        pipeline.set(key, self._channel, xx=True, keepttl=True)
        pipeline.set(key, self._channel, nx=True, px=int(stream_ttl_s * 1000))
        await pipeline.execute()

    async def renew_lease(self, lease_s: float) -> None:
        """Tells the workers that this API reads on for `lease_s`."""
        await self._connection.set(self._channel, 1, px=int(lease_s * 1000))

    async def find_vanished(self, request_ids: Sequence[str]) -> dict[str, GenerationFailed]:
        """The requests that ended without a last event in their log, each with the reason.

        Their job is gone, was canceled in its queue, was unreadable, or has ended (`EndLost`). The last is an
        error only if the reader still has no last event when it asks again.
        """
        pipeline = self._connection.pipeline(transaction=False)
        for request_id in request_ids:
            pipeline.hmget(Job.key_for(request_id), ["status", "unreadable"])
        found = zip(request_ids, _unless_fatal(await pipeline.execute(raise_on_error=False)), strict=True)
        reasons = {request_id: _why_vanished(reply) for request_id, reply in found}
        return {request_id: reason for request_id, reason in reasons.items() if reason is not None}

    async def read_logs(
        self, positions: Sequence[tuple[str, int]], *, max_num_events: int
    ) -> list[list[StreamEvent] | None]:
        """The events in the log of each (request id, first event_no), at most `max_num_events` of each.

        The result has None for a log that can't be read.
        """
        pipeline = self._connection.pipeline(transaction=False)
        for request_id, first in positions:
            pipeline.lrange(keys.log(request_id), first, first + max_num_events - 1)
        replies = _unless_fatal(await pipeline.execute(raise_on_error=False))
        return [_decode_log(reply, first) for reply, (_, first) in zip(replies, positions, strict=True)]


def _unless_fatal(replies: list[Any]) -> list[Any]:
    """The replies of a pipeline, `WRONGTYPE` errors included; any other error concerns all and is raised."""
    for reply in replies:
        if isinstance(reply, Exception) and not is_wrong_type(reply):
            raise reply
    return replies


def _why_vanished(reply: Any) -> GenerationFailed | None:
    """The error of a request, by the status of its job and the reason why it was unreadable."""
    if is_wrong_type(reply):
        return UnreadableRecord("job: a key of another type")
    status, unreadable = reply
    if unreadable is not None:
        return UnreadableRecord(unreadable.decode(errors="replace"))
    if status in (None, b"canceled"):
        return GenerationFailed("The request was removed from the queue.")
    return EndLost() if status in (b"finished", b"failed", b"stopped") else None


def _decode_log(reply: Any, first_event_no: int) -> list[StreamEvent] | None:
    """The events of a part of a log; None if an entry is no event or has a wrong number."""
    if is_wrong_type(reply):
        return None
    try:
        events = [decode_event(entry) for entry in reply]
    except (msgspec.DecodeError, RecursionError):
        return None
    is_right = all(event.event_no == number for number, event in enumerate(events, first_event_no))
    return events if is_right else None


def _retry_after_s(num_ended: int, over_s: float) -> int:
    """Seconds after which a client of a full queue should retry: when a few places will be free, at most 60.

    If no request has ended while others waited, it grows with the length of that time (`over_s`): soon
    in a burst on an idle deployment, ever later if nothing moves.
    """
    wait_s = NUM_ENDS_TO_AWAIT * over_s / num_ended if num_ended else over_s
    return max(1, min(MAX_RETRY_AFTER_S, math.ceil(wait_s)))
