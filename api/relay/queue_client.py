"""The Redis commands of an API process; each call returns within a deadline or raises a `LorelayError`."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import redis

from api.relay.live_workers import LiveWorkers
from shared.api_keys import Client
from shared.errors import (
    GenerationFailed,
    NoWorker,
    QueueOutOfMemory,
    QueueUnavailable,
    ServerDraining,
)
from shared.messages import GenerationRequest, StreamEvent
from shared.model_cards import ModelCard
from shared.queue import keys, presence, registry
from shared.queue.api_streams import ApiStreams, FoundRequest, QueueLimits
from shared.queue.connections import connect_async
from shared.queue.not_now import code_of
from shared.settings import ApiSettings, RedisSettings

NUM_CONNECTIONS = 32
MAX_PRESENCE_AGE_S = 0.5
LOG_MARGIN_S = 60
"""Lifetime of a request's log beyond its queue time limit plus its generation time limit."""


@asynccontextmanager
async def queue_errors(until: float) -> AsyncIterator[None]:
    """Turns Redis errors of the context, and a timeout at `until` (event loop's time), into `LorelayError`s.

    Raises:
        QueueOutOfMemory: Redis refused a write because it is out of memory.
        QueueUnavailable: any other error of Redis, or the timeout.
    """
    try:
        async with asyncio.timeout_at(until):
            yield
    except (redis.RedisError, OSError) as error:
        if isinstance(error, redis.RedisError) and code_of(error) == "OOM":
            raise QueueOutOfMemory from error
        raise QueueUnavailable from error


class QueueClient:
    """All Redis commands of an API process except its subscription, on one connection pool.

    Each method raises `QueueUnavailable` if Redis does not answer in time: within `redis_timeout_s`, or by
    `until` if the method has this parameter.
    """

    def __init__(self, redis_settings: RedisSettings, settings: ApiSettings) -> None:
        self.channel = keys.events_channel(uuid.uuid4().hex)
        """The pub/sub channel of this process's events; the Redis key with this name is its lease."""
        self.missing_permissions: str | None = None
        """Message that names the permissions that the Redis user lacks; None if the user has all of them."""
        self._settings = settings
        self._connection = connect_async(
            redis_settings, socket_timeout_s=settings.redis_timeout_s, max_num_connections=NUM_CONNECTIONS
        )
        self._streams = ApiStreams(self._connection, self.channel)
        self._live_workers = LiveWorkers(
            self._is_served, max_age_s=min(MAX_PRESENCE_AGE_S, settings.no_worker_wait_s / 4)
        )
        self._limits = QueueLimits(
            settings.max_queue_depth,
            settings.max_total_queue_depth,
            settings.max_queue_bytes,
            settings.max_tenant_share,
        )
        self._is_draining = False

    @property
    def exchange_limit_s(self) -> float:
        """Maximum time from the enqueue of a request to the end of its response; logs are kept as long."""
        return self._settings.queue_time_limit_s + self._settings.generation_limit_s + LOG_MARGIN_S

    def deadline(self) -> float:
        """Returns the deadline (event loop's time) for Redis's answer to a command that is sent now."""
        return asyncio.get_running_loop().time() + self._settings.redis_timeout_s

    def drain(self) -> None:
        """Makes this client refuse all further requests."""
        self._is_draining = True

    async def close(self) -> None:
        """Closes the connections."""
        await self._connection.aclose()

    async def ping(self) -> None:
        """Checks whether requests can be accepted.

        Raises:
            ServerDraining: this process is shutting down.
            QueueUnavailable: Redis can't be reached or refuses writes, or the Redis user lacks a permission.
        """
        if self._is_draining:
            raise ServerDraining
        if self.missing_permissions is not None:
            raise QueueUnavailable(self.missing_permissions)
        # The check writes, because a PING succeeds even on a replica or on a server without free memory.
        await self.renew_lease()

    async def renew_lease(self) -> None:
        """Renews this API process's lease: for `api_lease_s`, workers treat its clients as connected."""
        async with queue_errors(self.deadline()):
            await self._streams.renew_lease(self._settings.api_lease_s)

    async def fetch_card(self, model: str, until: float) -> ModelCard:
        """Returns the card of a model.

        Raises:
            ModelNotFound: no model has this name.
            NotServedYet: no worker has registered a model yet, or one is loading this model.
        """
        async with queue_errors(until):
            return await registry.fetch_card(self._connection, model)

    async def fetch_models(self) -> list[tuple[ModelCard, bool]]:
        """Returns the cards of all models, and for each model True if a live worker serves it."""
        async with queue_errors(self.deadline()):
            cards = await registry.fetch_cards(self._connection)
            return list(zip(cards, await presence.find_served(self._connection, cards), strict=True))

    async def fetch_model(self, name: str) -> tuple[ModelCard, bool]:
        """Returns a model's card, and True if a live worker serves it; raises the errors of `fetch_card`."""
        card = await self.fetch_card(name, self.deadline())
        return card, await self._is_served(card)

    async def has_live_worker(self, request: GenerationRequest) -> bool:
        """Returns True if a live worker serves the request's model; the answer may be half a second old."""
        return await self._live_workers.serve(request)

    async def _is_served(self, model: ModelCard | GenerationRequest) -> bool:
        async with queue_errors(self.deadline()):
            return (await presence.find_served(self._connection, [model]))[0]

    async def ping_model(self, name: str) -> None:
        """Checks whether a request for a model can be answered.

        Raises:
            ModelNotFound, NotServedYet: no model has this name.
            NoWorker: no live worker serves the model.
            ServerDraining, QueueUnavailable: see `ping`.
        """
        await self.ping()
        _, is_served = await self.fetch_model(name)
        if not is_served:
            raise NoWorker

    async def enqueue(self, request: GenerationRequest, client: str, until: float) -> None:
        """Puts a client's request on the queue of its model.

        Raises:
            ServerDraining: this process is shutting down.
            QueueFull: the queue, or all queues together, hold as many requests as the settings allow.
            QueueUnavailable: Redis did not answer by `until`; the request may be in the queue anyway.
        """
        if self._is_draining:
            raise ServerDraining
        async with queue_errors(until):
            await self._streams.enqueue(
                request,
                limits=self._limits,
                stream_ttl_s=self.exchange_limit_s,
                result_ttl_s=self._settings.result_ttl_s,
                failure_ttl_s=self._settings.failure_ttl_s,
                client=client,
            )

    async def find_request(self, request_id: str, client: Client) -> FoundRequest:
        """Returns a request that this client sent.

        Raises:
            RequestNotFound: no request has this id, or another client sent it.
        """
        async with queue_errors(self.deadline()):
            return await self._streams.find_request(request_id, client.ids)

    async def forget(self, request_id: str) -> None:
        """Deletes the data of a request that has ended. If Redis does not answer, the data expires later."""
        with contextlib.suppress(QueueUnavailable):
            async with queue_errors(self.deadline()):
                await self._streams.forget(request_id)

    async def attach(self, request_id: str) -> None:
        """Routes the events of an already enqueued request to this process."""
        async with queue_errors(self.deadline()):
            await self._streams.attach(request_id, self.exchange_limit_s)

    async def abort(self, request_id: str) -> str:
        """Aborts a request; returns its old state: `queued` (never runs), `running` (ends soon) or `gone`."""
        async with queue_errors(self.deadline()):
            return await self._streams.abort(request_id)

    async def abort_queued(self, request_id: str) -> str:
        """Removes a request unless a worker claimed it; returns `queued` (removed), `running` or `gone`."""
        async with queue_errors(self.deadline()):
            return await self._streams.abort(request_id, only_queued=True)

    async def take_back(self, request_id: str) -> str:
        """Puts a request back on its queue that a stock `rq worker` took and failed.

        Returns `queued` if the request waits again, `taken` if this has happened ten times before, `other`
        if no such worker took it.
        """
        async with queue_errors(self.deadline()):
            return await self._streams.take_back(request_id)

    async def end_overdue(self, min_pause_s: float) -> list[str]:
        """Ends requests that waited too long, at most once in `min_pause_s`; returns their ids."""
        async with queue_errors(self.deadline()):
            return await self._streams.end_overdue(min_pause_s)

    async def find_vanished(self, request_ids: Sequence[str]) -> dict[str, GenerationFailed]:
        """Returns the requests that are gone although their logs have no last event, each with the reason."""
        async with queue_errors(self.deadline()):
            return await self._streams.find_vanished(request_ids)

    async def read_logs(
        self, positions: Sequence[tuple[str, int]], max_num_events: int
    ) -> list[list[StreamEvent] | None]:
        """Returns the events in the logs of these requests; `positions` holds (request id, first event_no).

        Each log gives at most `max_num_events` events. A log that can't be read gives None.
        """
        async with queue_errors(self.deadline()):
            return await self._streams.read_logs(positions, max_num_events=max_num_events)
