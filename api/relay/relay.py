"""Takes events from the API process's subscription and from logs, and puts them into inboxes."""

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Iterator

import msgspec

from api.relay.aborter import Aborter
from api.relay.inbox import Inbox
from api.relay.queue_client import QueueClient
from api.relay.subscriber import PING_S, Subscriber
from api.relay.upkeep import end_overdue_loop, fail_vanished_loop, renew_lease_loop, watch_permissions
from shared.errors import GenerationFailed, QueueUnavailable, ServerDraining
from shared.logs import log_unexpected
from shared.messages import decode_event
from shared.queue.connections import connect
from shared.queue.outages import Outages
from shared.settings import ApiSettings, RedisSettings

logger = logging.getLogger(__name__)

CLOSE_WAIT_S = 2.0
CLOSE_POLL_S = 0.01
CANCEL_AGAIN_S = 0.1
UNREADABLE = "The answer can't be read: its log is damaged, or its worker runs a newer version than this API."


class Relay:
    """Delivers events to the inboxes of open HTTP exchanges.

    Events arrive over pub/sub, on one channel and one connection per process. Pub/sub may lose events, so a
    periodic task reads the logs of all requests whose inboxes missed an event or got no event for a while.
    """

    def __init__(
        self,
        queue: QueueClient,
        redis_settings: RedisSettings,
        settings: ApiSettings,
        *,
        ping_s: float = PING_S,
    ) -> None:
        self.queue = queue
        self._settings = settings
        self._outages = Outages(logger)
        self._subscriber = Subscriber(
            redis_settings,
            queue.channel,
            subscribe_limit_s=settings.redis_timeout_s,
            outages=self._outages,
            ping_s=ping_s,
        )
        self._permission_pool = connect(
            redis_settings, socket_timeout_s=settings.redis_timeout_s
        ).connection_pool
        self._inboxes: dict[bytes, Inbox] = {}
        self._log_wanted = asyncio.Event()
        self._aborter = Aborter(queue)
        self._tasks: list[asyncio.Task[None]] = []
        self._is_draining = False

    @property
    def inboxes(self) -> list[Inbox]:
        """The inboxes of all open HTTP exchanges."""
        return list(self._inboxes.values())

    @property
    def is_aborting(self) -> bool:
        """True while there are aborts that Redis has not accepted."""
        return self._aborter.is_busy

    def start(self) -> None:
        """Starts the background tasks in the running event loop; Redis need not be reachable yet."""
        works = {
            "subscriber": self._subscriber.run(self._deliver, self._on_subscribed),
            "log reader": self._read_logs_loop(),
            "aborter": self._aborter.run(),
            "lease": renew_lease_loop(self.queue, self._settings.api_lease_s),
            "permissions": watch_permissions(self._permission_pool, self._note_missing_permissions),
            "overdue": end_overdue_loop(self.queue),
            "vanished": fail_vanished_loop(self.queue, self._settings, self._inboxes.values),
        }
        self._tasks = [asyncio.create_task(work, name=name) for name, work in works.items()]

    def _note_missing_permissions(self, message: str | None) -> None:
        self.queue.missing_permissions = message

    def drain(self) -> None:
        """Refuses new requests; HTTP exchanges still open after `api_drain_s` end with an error."""
        self.queue.drain()
        if not self._is_draining:
            self._is_draining = True
            asyncio.get_running_loop().call_later(self._settings.api_drain_s, self._end_open)

    def _end_open(self) -> None:
        for inbox in self._inboxes.values():
            inbox.fail(ServerDraining())

    async def close(self) -> None:
        """Ends open HTTP exchanges with an error, sends the pending aborts, and closes all connections."""
        self._end_open()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_WAIT_S):
                while self._inboxes or self._aborter.is_busy:
                    await asyncio.sleep(CLOSE_POLL_S)
        await _cancel(self._tasks)
        await self._subscriber.close()
        await self.queue.close()

    @contextlib.contextmanager
    def open_inbox(self, request_id: str) -> Iterator[Inbox]:
        """Opens an inbox that gets the events of `request_id` while the context lasts."""
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

    def abort_soon(self, request_id: str) -> None:
        """Aborts a queued or running request; the abort is sent even if the caller is cancelled."""
        until = asyncio.get_running_loop().time() + self.queue.exchange_limit_s
        self._aborter.abort(request_id, until)

    def _deliver(self, data: bytes) -> None:
        """Puts each line of a message, `<request id> <event>`, into the inbox of its request."""
        inboxes = self._inboxes
        for line in data.split(b"\n"):
            request_id, _, encoded = line.partition(b" ")
            inbox = inboxes.get(request_id)
            if inbox is None:
                continue
            try:
                inbox.put(decode_event(encoded))
            except (msgspec.DecodeError, RecursionError):
                # The published copy of this event can't be decoded; the copy in the log may be intact.
                inbox.fall_behind()

    def _on_subscribed(self) -> None:
        """Asks for a read of all logs: pub/sub does not deliver events from before the subscription."""
        for inbox in self._inboxes.values():
            inbox.fall_behind()

    async def _read_logs_loop(self) -> None:
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
        """Reads the logs of these inboxes in one round trip; after a failure, the next turn reads again."""
        for inbox in inboxes:
            inbox.begin_log_read()
        page = self._settings.max_inbox_events
        positions = [(inbox.request_id, inbox.next_event_no) for inbox in inboxes]
        try:
            logs = await self.queue.read_logs(positions, page)
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
    """Cancels tasks, repeatedly if need be, until all have ended.

    One cancellation is not enough: redis-py sends under `asyncio.wait_for`, which can swallow a cancellation.
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=CANCEL_AGAIN_S)
