"""The API's calls to Redis for the queues and the token logs. `worker_streams` has the workers' calls."""

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, cast

import msgspec
import redis.asyncio
from rq.job import Job
from rq.queue import Queue

from shared.errors import GenerationFailed, QueueFull, RequestNotFound
from shared.messages import GenerationRequest, StreamEvent, decode_event
from shared.queue import keys
from shared.queue.claims import UnreadableRecord, read_request
from shared.queue.connections import is_wrong_type
from shared.queue.job_record import job_fields
from shared.queue.names import queue_name, slug
from shared.queue.scripts import log_unreadable, script_source

MAX_RETRY_AFTER_S = 60
NUM_ENDS_TO_AWAIT = 5
NUM_QUEUES_PER_CALL = 100
_WAITING = {
    b"requests": "{} requests",
    b"bytes": "Requests of {} bytes together",
    b"requests of tenant": "{} requests of this API key",
    b"bytes of tenant": "Requests of this API key with {} bytes together",
}


class EndLost(GenerationFailed):
    """The request has ended, but its log has lost the last event."""


class TakenByOther(GenerationFailed):
    """A worker that is not Lorelay's took the request: start workers with -w worker.LoraWorker."""


class QueueLimits(NamedTuple):
    """Limits for the requests that wait."""

    depth: int
    """Maximum number of requests in one queue."""
    total_depth: int
    """Maximum number of requests in all queues of a base together."""
    num_bytes: int
    """Maximum size of all requests that wait for a base, prompts included. One request is always let in."""
    tenant_share: float = 1.0
    """Part of each limit that the requests of one API key may use; ignored for requests without a key."""

    def of(self, tenant: str) -> list[int]:
        """Returns the limits for `enqueue.lua`: first for all requests, then for this tenant."""
        limits = [self.depth, self.total_depth, self.num_bytes]
        share = self.tenant_share if tenant else 1.0
        return [*limits, *(max(1, int(limit * share)) for limit in limits)]


class FoundRequest(NamedTuple):
    """A request that is in Redis, and its progress."""

    request: GenerationRequest
    num_events: int
    has_ended: bool


class ApiStreams:
    """Enqueues and aborts requests, and reads their logs."""

    def __init__(self, connection: redis.asyncio.Redis, channel: str) -> None:
        self._connection = connection
        self._channel = channel
        self._enqueue = connection.register_script(script_source("enqueue"))
        self._abort = connection.register_script(script_source("abort"))
        self._take_back = connection.register_script(script_source("take_back"))
        self._end_overdue = connection.register_script(script_source("end_overdue"))

    async def enqueue(
        self,
        request: GenerationRequest,
        *,
        limits: QueueLimits,
        stream_ttl_s: float,
        result_ttl_s: int,
        failure_ttl_s: int,
        client: str = "",
    ) -> None:
        """Checks the queue limits and enqueues a request in one atomic step.

        `client` is the tenant that sends the request (`Client.tenant`). Only this tenant may resume or abort
        the request.

        Raises:
            QueueFull: one of the limits is reached.
        """
        queue = queue_name(request.base, request.adapter_name)
        fields = job_fields(
            request,
            queue,
            client,
            result_ttl_s=result_ttl_s,
            failure_ttl_s=failure_ttl_s,
            stream_ttl_s=stream_ttl_s,
        )
        flat = [item for field in fields.items() for item in field]
        reply = await self._enqueue(
            args=[
                request.request_id,
                slug(request.base),
                queue,
                msgspec.msgpack.encode(limits.of(request.tenant)),
                self._channel,
                int(stream_ttl_s * 1000),
                math.ceil((request.wait_limit_s or 0) * 1000),
                *flat,
            ]
        )
        if reply[0] == b"full":
            _, what, number, num_ended, over_ms = reply
            raise QueueFull(
                f"{_WAITING[what].format(number)} are waiting already; try again later.",
                retry_after_s=_retry_after_s(num_ended=num_ended, over_s=over_ms / 1000),
            )

    async def abort(self, request_id: str, *, only_queued: bool = False, ttl_s: int = 60) -> str:
        """Aborts a request, and returns the state in which the request was.

        `queued`: the request was removed and never runs. `running`: the request was flagged, and its worker
        will end it. `gone`: the request had ended, or does not exist. With `only_queued`, a running request
        is not flagged.
        """
        reply = await self._abort(args=[request_id, int(only_queued), ttl_s])
        return reply.decode()  # type: ignore[no-any-return]

    async def take_back(self, request_id: str) -> str:
        """Puts a request back on its queue that a worker of another class has taken and failed.

        Returns `queued` if the request waits again, `taken` if this has happened ten times before, and
        `other` if no such worker has taken the request.
        """
        reply = await self._take_back(args=[request_id])
        return reply.decode()  # type: ignore[no-any-return]

    async def end_overdue(self, min_pause_s: float) -> list[str]:
        """Ends requests that have waited longer than their limit in any queue; returns their ids.

        Does nothing if an API process has called this script in the last `min_pause_s`.
        """
        if not await self._connection.set(keys.OVERDUE_CHECK, 1, nx=True, px=int(min_pause_s * 1000)):
            return []
        prefix = Queue.redis_queue_namespace_prefix
        members = cast("set[bytes]", await self._connection.smembers(Queue.redis_queues_keys))
        names = [member.decode(errors="replace").removeprefix(prefix) for member in members]
        ended: list[str] = []
        # One call for all queues would block Redis too long.
        for start in range(0, len(names), NUM_QUEUES_PER_CALL):
            ids, unreadable = await self._end_overdue(args=names[start : start + NUM_QUEUES_PER_CALL])
            log_unreadable(unreadable)
            ended += [request_id.decode() for request_id in ids]
        return ended

    async def find_request(self, request_id: str, clients: Collection[str]) -> FoundRequest:
        """Finds a request that this client sent.

        If the request is detached, it is returned without its prompt.

        RQ's job must still be in Redis.

        `clients`: the ids under which requests of this client may be stored; see `shared.api_keys.Client`.

        Raises:
            RequestNotFound: no request has this id, or another client sent it.
            UnreadableRecord: the job or the log of the request can't be read.
        """
        pipeline = self._connection.pipeline()
        pipeline.hmget(Job.key_for(request_id), ["outline", "client", "has_ended"])
        pipeline.llen(keys.log(request_id))
        job, num_events = _unless_fatal(await pipeline.execute(raise_on_error=False))
        if is_wrong_type(job) or is_wrong_type(num_events):
            raise UnreadableRecord("a key of another type")
        encoded, sender, has_ended = job
        if not encoded:
            # The request is not detached, or an API of an earlier release enqueued it.
            encoded = await self._connection.hget(Job.key_for(request_id), "request")
        if not encoded or sender is None or sender.decode(errors="replace") not in clients:
            raise RequestNotFound
        return FoundRequest(read_request(encoded), num_events, has_ended is not None)

    async def attach(self, request_id: str, stream_ttl_s: float) -> None:
        """Makes workers publish the further events of a request to this API process."""
        key = keys.reader(request_id)
        pipeline = self._connection.pipeline()
        # An existing key keeps its expiry: if the request has ended, the key expires together with the log.
        pipeline.set(key, self._channel, xx=True, keepttl=True)
        pipeline.set(key, self._channel, nx=True, px=int(stream_ttl_s * 1000))
        await pipeline.execute()

    async def forget(self, request_id: str) -> None:
        """Deletes the data of a request that has ended."""
        await self._connection.delete(Job.key_for(request_id), keys.log(request_id), keys.reader(request_id))

    async def renew_lease(self, lease_s: float) -> None:
        """Renews this API process's lease: for `lease_s` seconds, workers treat its clients as connected."""
        await self._connection.set(self._channel, 1, px=int(lease_s * 1000))

    async def find_vanished(self, request_ids: Sequence[str]) -> dict[str, GenerationFailed]:
        """Returns those requests that will get no more events, each with the error for its client.

        The job of such a request was deleted, was canceled in the queue, can't be read, was taken by a worker
        of another class (`TakenByOther`), or has ended (`EndLost`). After `TakenByOther`, `take_back` may put
        the request back on its queue. After `EndLost`, the last event may still arrive, so callers fail the
        request only if a later call returns it again.
        """
        pipeline = self._connection.pipeline(transaction=False)
        for request_id in request_ids:
            pipeline.hmget(Job.key_for(request_id), ["status", "unreadable", "has_ended"])
        found = zip(request_ids, _unless_fatal(await pipeline.execute(raise_on_error=False)), strict=True)
        reasons = {request_id: _why_vanished(reply) for request_id, reply in found}
        return {request_id: reason for request_id, reason in reasons.items() if reason is not None}

    async def read_logs(
        self, positions: Sequence[tuple[str, int]], *, max_num_events: int
    ) -> list[list[StreamEvent] | None]:
        """Reads at most `max_num_events` events of each log, for (request id, first event_no) in `positions`.

        The result has None for a log that can't be read.
        """
        pipeline = self._connection.pipeline(transaction=False)
        for request_id, first in positions:
            pipeline.lrange(keys.log(request_id), first, first + max_num_events - 1)
        replies = _unless_fatal(await pipeline.execute(raise_on_error=False))
        return [_decode_log(reply, first) for reply, (_, first) in zip(replies, positions, strict=True)]


def _unless_fatal(replies: list[Any]) -> list[Any]:
    """Returns the replies of a pipeline, including `WRONGTYPE` errors; raises the first other error."""
    for reply in replies:
        if isinstance(reply, Exception) and not is_wrong_type(reply):
            raise reply
    return replies


def _why_vanished(reply: Any) -> GenerationFailed | None:
    """Returns the error that a request's client gets, by the job's status; None if events may still come."""
    if is_wrong_type(reply):
        return UnreadableRecord("job: a key of another type")
    status, unreadable, has_ended = reply
    if unreadable is not None:
        return UnreadableRecord(unreadable.decode(errors="replace"))
    if status in (None, b"canceled"):
        return GenerationFailed("The request was removed from the queue.")
    if status not in (b"finished", b"failed", b"stopped"):
        return None
    return EndLost() if has_ended is not None else TakenByOther()


def _decode_log(reply: Any, first_event_no: int) -> list[StreamEvent] | None:
    """Decodes a part of a log; returns None if an entry is no event or has a wrong number."""
    if is_wrong_type(reply):
        return None
    try:
        events = [decode_event(entry) for entry in reply]
    except (msgspec.DecodeError, RecursionError):
        return None
    is_right = all(event.event_no == number for number, event in enumerate(events, first_event_no))
    return events if is_right else None


def _retry_after_s(num_ended: int, over_s: float) -> int:
    """Returns the seconds (1 to 60) after which a client of a full queue should retry.

    `num_ended` requests ended in the last `over_s` seconds. The result is the time in which
    `NUM_ENDS_TO_AWAIT` requests will end at this rate. If no request has ended, the result is `over_s`, which
    is then the time since the oldest request was enqueued.
    """
    wait_s = NUM_ENDS_TO_AWAIT * over_s / num_ended if num_ended else over_s
    return max(1, min(MAX_RETRY_AFTER_S, math.ceil(wait_s)))
