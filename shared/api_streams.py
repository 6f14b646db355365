"""The API's end of the queue and the token log; the worker's is in `shared.streams`."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import redis.asyncio
from rq.job import Job

from shared import keys
from shared.errors import QueueFull, RequestNotFound
from shared.jobs import job_fields
from shared.messages import GenerationRequest, StreamEvent, decode_event, decode_request
from shared.queues import queue_name, slug
from shared.streams import script_source

MAX_RETRY_AFTER_S = 60
NUM_PLACES_TO_AWAIT = 5


class FoundRequest(NamedTuple):
    """A request that was enqueued before, and how far it is."""

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
                retry_after_s=_retry_after_s(num_ended=reply[2], over_s=reply[3] / 1000),
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


def _retry_after_s(num_ended: int, over_s: float) -> int:
    """When a client of a full queue should come back: when a few places will be free, within a minute.

    Where nothing has ended while somebody waited, that is told by how long (`over_s`): in a burst on an idle
    deployment soon, later and later where nothing moves.
    """
    wait_s = NUM_PLACES_TO_AWAIT * over_s / num_ended if num_ended else over_s
    return max(1, min(MAX_RETRY_AFTER_S, math.ceil(wait_s)))
