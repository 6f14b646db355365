"""The API process's end of the queue: requests go out, and one subscriber brings their events back."""

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Iterable, Iterator

import msgspec
import redis
from redis.asyncio.client import PubSub

from api.relay.aborter import Aborter, backoff
from api.relay.inbox import Inbox
from api.relay.queue_errors import queue_errors
from api.relay.upkeep import fail_vanished_forever, renew_lease_forever, watch_permissions
from shared.errors import GenerationFailed, QueueUnavailable, ServerDraining
from shared.logs import log_unexpected
from shared.messages import GenerationRequest, ModelCard, decode_event
from shared.queue import keys, registry
from shared.queue.api_streams import ApiStreams, FoundRequest
from shared.queue.connections import connect, connect_async
from shared.queue.outages import Outages
from shared.settings import ApiSettings, RedisSettings

logger = logging.getLogger(__name__)

PING_S = 5.0
"""Silence of the subscriber's connection after which it is tried, and then given up."""
NUM_CONNECTIONS = 32
STREAM_MARGIN_S = 60
"""How much longer than its limits a request's log lives."""
CLOSE_WAIT_S = 2.0
CANCEL_AGAIN_S = 0.1
UNREADABLE = "The answer can't be read: its log is damaged, or its worker runs a newer version than this API."


class Relay:
    """Requests to the queue, their events back to inboxes.

    Events come over pub/sub, one channel and one connection for the process. That is only the wake-up: one
    periodic task reads the log for every inbox that missed something or has been silent for a while.
    """

    def __init__(
        self, redis_settings: RedisSettings, settings: ApiSettings, *, ping_s: float = PING_S
    ) -> None:
        self._settings = settings
        self._ping_s = ping_s
        self._connection = connect_async(
            redis_settings, socket_timeout_s=settings.redis_timeout_s, max_num_connections=NUM_CONNECTIONS
        )
        self._subscriber = connect_async(redis_settings, max_num_retries=0)
        self._permission_pool = connect(
            redis_settings, socket_timeout_s=settings.redis_timeout_s
        ).connection_pool
        self._lacking: str | None = None
        self._channel = keys.events_channel(uuid.uuid4().hex)
        self._streams = ApiStreams(self._connection, self._channel)
        self._inboxes: dict[bytes, Inbox] = {}
        self._log_wanted = asyncio.Event()
        self._aborter = Aborter(self._streams, settings)
        self._tasks: list[asyncio.Task[None]] = []
        self._outages = Outages(logger)
        self._is_draining = False

    @property
    def stream_ttl_s(self) -> float:
        """How long after its enqueue a request's log lives, and its exchange at most."""
        return self._settings.queue_time_limit_s + self._settings.generation_limit_s + STREAM_MARGIN_S

    @property
    def inboxes(self) -> list[Inbox]:
        """Those of the exchanges that are open now."""
        return list(self._inboxes.values())

    def patience(self) -> float:
        """The event loop's time until which Redis may answer a client that begins to wait now."""
        return asyncio.get_running_loop().time() + self._settings.redis_timeout_s

    def start(self) -> None:
        """Starts the subscriber and the reader of logs; Redis need not be there yet."""
        self._tasks = [
            asyncio.create_task(self._subscribe_forever(), name="subscriber"),
            asyncio.create_task(self._read_logs_forever(), name="log reader"),
            asyncio.create_task(self._aborter.run(), name="aborter"),
            asyncio.create_task(renew_lease_forever(self._streams, self._settings), name="lease"),
            asyncio.create_task(
                watch_permissions(self._permission_pool, self._note_lacking), name="permissions"
            ),
            asyncio.create_task(
                fail_vanished_forever(self._streams, self._settings, self._inboxes.values), name="vanished"
            ),
        ]

    def _note_lacking(self, message: str | None) -> None:
        self._lacking = message

    def drain(self) -> None:
        """Takes no new requests; what is still open after `api_drain_s` ends with an error."""
        if not self._is_draining:
            self._is_draining = True
            asyncio.get_running_loop().call_later(self._settings.api_drain_s, self._end_open)

    def _end_open(self) -> None:
        for inbox in self._inboxes.values():
            inbox.fail(ServerDraining())

    async def close(self) -> None:
        """Ends what is open with an error, lets aborts through, closes the connections."""
        self._end_open()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_WAIT_S):
                while self._inboxes or self._aborter.is_busy:
                    await asyncio.sleep(0.01)
        await _cancel(self._tasks)
        await self._subscriber.aclose()
        await self._connection.aclose()

    async def ping(self) -> None:
        """Asks whether requests can be taken.

        Raises:
            ServerDraining: this process is about to end.
            QueueUnavailable: Redis is not there or takes no writes now, or its user lacks a permission.
        """
        if self._is_draining:
            raise ServerDraining
        if self._lacking is not None:
            raise QueueUnavailable(self._lacking)
        async with queue_errors(self.patience()):
            # A ping would be answered by a replica, and by a server without memory, too.
            await self._streams.renew_lease(self._settings.api_lease_s)

    async def fetch_card(self, model: str, until: float) -> ModelCard:
        """The card of a model.

        Raises:
            ModelNotFound: there is none of this name.
            QueueUnavailable: Redis did not answer `until` then.
        """
        async with queue_errors(until):
            return await registry.fetch_card(self._connection, model)

    async def fetch_cards(self) -> list[ModelCard]:
        """All cards.

        Raises:
            QueueUnavailable: Redis did not answer.
        """
        async with queue_errors(self.patience()):
            return await registry.fetch_cards(self._connection)

    async def has_live_worker(self, request: GenerationRequest) -> bool:
        """Whether a worker that serves this request's model is up.

        Raises:
            QueueUnavailable: Redis did not answer.
        """
        async with queue_errors(self.patience()):
            return await registry.has_live_worker(self._connection, request.base, request.adapter_name)

    @contextlib.contextmanager
    def open_inbox(self, request_id: str) -> Iterator[Inbox]:
        """An inbox that events of `request_id` go to while the context lasts."""
        inbox = Inbox(
            request_id, self._settings.max_inbox_events, self._settings.max_silence_s, self._log_wanted.set
        )
        if (former := self._inboxes.get(request_id.encode())) is not None:
            former.fail(GenerationFailed("The stream was resumed by another connection."))
        self._inboxes[request_id.encode()] = inbox
        try:
            yield inbox
        finally:
            inbox.close()
            if self._inboxes.get(request_id.encode()) is inbox:
                del self._inboxes[request_id.encode()]

    async def find_request(self, request_id: str, client: str) -> FoundRequest:
        """A request that this client sent.

        Raises:
            RequestNotFound: there is none.
            QueueUnavailable: Redis did not answer.
        """
        async with queue_errors(self.patience()):
            return await self._streams.find_request(request_id, client)

    async def attach(self, inbox: Inbox, first_event_no: int) -> None:
        """Fills the inbox of a request that was enqueued before, from this event on.

        Raises:
            QueueUnavailable: Redis did not answer.
        """
        async with queue_errors(self.patience()):
            await self._streams.attach(inbox.request_id, self.stream_ttl_s)
        inbox.start_at(first_event_no)

    async def abort(self, request_id: str) -> str:
        """Gives a request up now: `queued` (it never runs), `running` (it ends soon) or `gone`.

        Raises:
            QueueUnavailable: Redis did not answer.
        """
        async with queue_errors(self.patience()):
            return await self._streams.abort(request_id)

    async def enqueue(self, request: GenerationRequest, client: str, until: float) -> None:
        """Puts a request of a client on its queue.

        Raises:
            ServerDraining: this process is about to end.
            QueueFull: there is no room for it.
            QueueUnavailable: Redis did not answer `until` then; the request may stand there all the same.
        """
        if self._is_draining:
            raise ServerDraining
        async with queue_errors(until):
            await self._streams.enqueue(
                request,
                max_queue_depth=self._settings.max_queue_depth,
                max_total_queue_depth=self._settings.max_total_queue_depth,
                stream_ttl_s=self.stream_ttl_s,
                result_ttl_s=self._settings.result_ttl_s,
                failure_ttl_s=self._settings.failure_ttl_s,
                client=client,
            )

    async def abort_queued(self, request_id: str) -> str:
        """Removes a request that no worker has claimed: `queued` (removed), else `running` or `gone`.

        Raises:
            QueueUnavailable: Redis did not answer.
        """
        async with queue_errors(self.patience()):
            return await self._streams.abort(request_id, only_queued=True)

    def abort_soon(self, request_id: str) -> None:
        """Gives a request up, whatever it does now; works on after the caller is cancelled."""
        self._aborter.abort(request_id, asyncio.get_running_loop().time() + self.stream_ttl_s)

    async def _subscribe_forever(self) -> None:
        pauses = backoff()
        while True:
            try:
                async with self._subscriber.pubsub() as pubsub:
                    await self._subscribe(pubsub)
                    pauses = backoff()
                    await self._receive(pubsub)
            except (redis.RedisError, OSError) as error:
                self._outages.begin("subscriber", error)
            except Exception as error:
                log_unexpected(logger, error)
            await asyncio.sleep(next(pauses))

    async def _subscribe(self, pubsub: PubSub) -> None:
        async with asyncio.timeout(self._settings.redis_timeout_s):
            await pubsub.subscribe(self._channel)

    async def _receive(self, pubsub: PubSub) -> None:
        """Delivers messages until the connection fails.

        Raises:
            TimeoutError: the server answers no more, on a connection that looks alive.
        """
        pinged = False
        while True:
            message = await pubsub.get_message(timeout=self._ping_s)
            if message is None:
                if pinged:
                    raise TimeoutError(f"no answer to a ping within {self._ping_s:g} s")
                pinged = True
                await pubsub.ping()
                continue
            pinged = False
            if message["type"] == "message":
                self._deliver(message["data"])
            elif message["type"] == "subscribe":
                self._on_subscribed()

    def _deliver(self, data: bytes) -> None:
        """Hands each line of a message, `<request id> <event>`, to its inbox."""
        inboxes = self._inboxes
        for line in data.split(b"\n"):
            request_id, _, encoded = line.partition(b" ")
            inbox = inboxes.get(request_id)
            if inbox is None:
                continue
            try:
                inbox.put(decode_event(encoded))
            except (msgspec.DecodeError, RecursionError):
                # The log tells whether the event itself can't be read, or just what was published.
                inbox.fall_behind()

    def _on_subscribed(self) -> None:
        """What was published while nobody listened stands in the logs only."""
        self._outages.end("subscriber")
        for inbox in self._inboxes.values():
            inbox.fall_behind()

    async def _read_logs_forever(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            alarm = loop.call_later(self._settings.max_silence_s / 2, self._log_wanted.set)
            await self._log_wanted.wait()
            alarm.cancel()
            self._log_wanted.clear()
            now = loop.time()
            if inboxes := [inbox for inbox in self._inboxes.values() if inbox.wants_log(now)]:
                await self._read_logs(inboxes)

    async def _read_logs(self, inboxes: list[Inbox]) -> None:
        """Reads on for these inboxes, in one round trip; a failure is made up for at the next turn."""
        for inbox in inboxes:
            inbox.log_is_being_read()
        page = self._settings.max_inbox_events
        try:
            async with queue_errors(self.patience()):
                logs = await self._streams.read_logs(
                    [(inbox.request_id, inbox.next_event_no) for inbox in inboxes], max_num_events=page
                )
        except QueueUnavailable as error:
            self._outages.begin("log reader", error.__cause__ or error)
            await asyncio.sleep(self._settings.max_silence_s / 2)
            for inbox in inboxes:
                inbox.fall_behind()
        except Exception as error:
            log_unexpected(logger, error)
        else:
            self._outages.end("log reader")
            for inbox, events in zip(inboxes, logs, strict=True):
                if events is None:
                    inbox.fail(GenerationFailed(UNREADABLE))
                else:
                    inbox.put_log(events, is_all=len(events) < page)


async def _cancel(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Ends tasks for good: redis-py sends under `asyncio.wait_for`, which can swallow a cancellation."""
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=CANCEL_AGAIN_S)
