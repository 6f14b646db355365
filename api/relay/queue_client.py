"""The queue as an API process uses it: each call is answered in time, or raises an exception of ours."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import redis

from shared.errors import GenerationFailed, QueueOutOfMemory, QueueUnavailable, ServerDraining
from shared.messages import GenerationRequest, ModelCard, StreamEvent
from shared.queue import keys, registry
from shared.queue.api_streams import ApiStreams, FoundRequest
from shared.queue.connections import connect_async
from shared.queue.not_now import code_of
from shared.settings import ApiSettings, RedisSettings

NUM_CONNECTIONS = 32
LOG_MARGIN_S = 60
"""Life of a request's log beyond the limits of its waiting and its generation."""


@asynccontextmanager
async def queue_errors(until: float) -> AsyncIterator[None]:
    """Turns every failure of Redis inside, and the event loop's time passing `until`, into our exceptions.

    Raises:
        QueueOutOfMemory: the server refused to write for want of memory.
        QueueUnavailable: anything else.
    """
    try:
        async with asyncio.timeout_at(until):
            yield
    except (redis.RedisError, OSError) as error:
        if isinstance(error, redis.RedisError) and code_of(error) == "OOM":
            raise QueueOutOfMemory from error
        raise QueueUnavailable from error


class QueueClient:
    """Every Redis command of an API process but the subscription, on one pool of connections.

    Each method raises `QueueUnavailable` when Redis does not answer within `redis_timeout_s`, or before
    `until` where a caller gives its own deadline.
    """

    def __init__(self, redis_settings: RedisSettings, settings: ApiSettings) -> None:
        self.channel = keys.events_channel(uuid.uuid4().hex)
        """The pub/sub channel of this process's events; its key is the process's lease, too."""
        self.lacking: str | None = None
        """The permissions that the Redis user lacks, as a message for the operator."""
        self._settings = settings
        self._connection = connect_async(
            redis_settings, socket_timeout_s=settings.redis_timeout_s, max_num_connections=NUM_CONNECTIONS
        )
        self._streams = ApiStreams(self._connection, self.channel)
        self._is_draining = False

    @property
    def exchange_limit_s(self) -> float:
        """Longest time from a request's enqueue to the end of its exchange; its log lives as long."""
        return self._settings.queue_time_limit_s + self._settings.generation_limit_s + LOG_MARGIN_S

    def deadline(self) -> float:
        """The event loop's time by which Redis has to answer a command that is sent now."""
        return asyncio.get_running_loop().time() + self._settings.redis_timeout_s

    def drain(self) -> None:
        """Refuses new requests from now on."""
        self._is_draining = True

    async def close(self) -> None:
        """Closes the connections."""
        await self._connection.aclose()

    async def ping(self) -> None:
        """Asks whether requests can be taken.

        Raises:
            ServerDraining: this process is about to end.
            QueueUnavailable: Redis is not there or takes no writes now, or its user lacks a permission.
        """
        if self._is_draining:
            raise ServerDraining
        if self.lacking is not None:
            raise QueueUnavailable(self.lacking)
        # A write, because a PING is answered by a replica and by a server without memory, too.
        await self.renew_lease()

    async def renew_lease(self) -> None:
        """Tells the workers that this process lives and reads events on for `api_lease_s`."""
        async with queue_errors(self.deadline()):
            await self._streams.renew_lease(self._settings.api_lease_s)

    async def fetch_card(self, model: str, until: float) -> ModelCard:
        """The card of a model.

        Raises:
            ModelNotFound: there is none of this name.
        """
        async with queue_errors(until):
            return await registry.fetch_card(self._connection, model)

    async def fetch_cards(self) -> list[ModelCard]:
        """The cards of all models."""
        async with queue_errors(self.deadline()):
            return await registry.fetch_cards(self._connection)

    async def has_live_worker(self, request: GenerationRequest) -> bool:
        """True if a worker that serves the request's model is alive."""
        async with queue_errors(self.deadline()):
            return await registry.has_live_worker(self._connection, request.base, request.adapter_name)

    async def enqueue(self, request: GenerationRequest, client: str, until: float) -> None:
        """Puts a request of a client on its queue.

        Raises:
            ServerDraining: this process is about to end.
            QueueFull: there is no room for it.
            QueueUnavailable: Redis did not answer `until` then; the request may stand in the queue anyway.
        """
        if self._is_draining:
            raise ServerDraining
        async with queue_errors(until):
            await self._streams.enqueue(
                request,
                max_queue_depth=self._settings.max_queue_depth,
                max_total_queue_depth=self._settings.max_total_queue_depth,
                stream_ttl_s=self.exchange_limit_s,
                result_ttl_s=self._settings.result_ttl_s,
                failure_ttl_s=self._settings.failure_ttl_s,
                client=client,
            )

    async def find_request(self, request_id: str, client: str) -> FoundRequest:
        """A request that this client sent.

        Raises:
            RequestNotFound: there is none.
        """
        async with queue_errors(self.deadline()):
            return await self._streams.find_request(request_id, client)

    async def attach(self, request_id: str) -> None:
        """Directs the events of a request that was enqueued before to this process."""
        async with queue_errors(self.deadline()):
            await self._streams.attach(request_id, self.exchange_limit_s)

    async def abort(self, request_id: str) -> str:
        """Gives a request up now: `queued` (it never runs), `running` (it ends soon) or `gone`."""
        async with queue_errors(self.deadline()):
            return await self._streams.abort(request_id)

    async def abort_queued(self, request_id: str) -> str:
        """Removes a request that no worker has claimed: `queued` (removed), else `running` or `gone`."""
        async with queue_errors(self.deadline()):
            return await self._streams.abort(request_id, only_queued=True)

    async def find_vanished(self, request_ids: Sequence[str]) -> dict[str, GenerationFailed]:
        """The requests that exist no more although their logs tell no end, each with the reason."""
        async with queue_errors(self.deadline()):
            return await self._streams.find_vanished(request_ids)

    async def read_logs(
        self, positions: Sequence[tuple[str, int]], max_num_events: int
    ) -> list[list[StreamEvent] | None]:
        """The logged events from each (request id, first event_no) on, at most `max_num_events` of each.

        None in the place of a log that can't be read.
        """
        async with queue_errors(self.deadline()):
            return await self._streams.read_logs(positions, max_num_events=max_num_events)
