"""Buffers the events of one request until its HTTP response takes them."""

import asyncio
from collections.abc import Callable, Iterable

from shared.messages import StreamEvent

MAX_SILENCE_FACTOR = 4
"""Maximum pause between two reads of a log without new events, as a multiple of `max_silence_s`."""


class Inbox:
    """Delivers each event of one request exactly once, in order of `event_no`, to one consumer.

    Pub/sub may deliver events to `put` late, twice or not at all. If an event is missing, or if
    `max_num_events` wait for a slow consumer, `wants_log` becomes true. The owner of the inbox must then read
    the request's log from `next_event_no` on and pass the events to `put_log`.
    """

    def __init__(
        self, request_id: str, max_num_events: int, max_silence_s: float, call_for_log: Callable[[], None]
    ) -> None:
        self.request_id = request_id
        self.next_event_no = 0
        """Number of the next event to accept; all earlier events were accepted."""
        self._max_num_events = max_num_events
        self._max_silence_s = self._silence_s = max_silence_s
        self._call_for_log = call_for_log
        self._loop = asyncio.get_running_loop()
        self._last_heard = self.quiet_since = self._loop.time()
        """`quiet_since` is the time at which an event last arrived or was taken; see `is_quiet`."""
        self._events: list[StreamEvent] = []
        self._behind = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._alarm: asyncio.TimerHandle | None = None

    @property
    def num_waiting(self) -> int:
        """Number of events in memory that the consumer has not taken yet."""
        return len(self._events)

    def is_quiet(self, min_quiet_s: float) -> bool:
        """True if no event waits, and none arrived or was taken in the last `min_quiet_s`."""
        return not self._events and self._loop.time() - self.quiet_since >= min_quiet_s

    def start_at(self, event_no: int) -> None:
        """Makes `event_no` the first event to deliver, and asks for a read of the log."""
        self.next_event_no = event_no
        self.fall_behind()

    def put(self, event: StreamEvent) -> None:
        """Accepts an event if it is the next one; drops it if it is a duplicate or out of order."""
        if event.event_no < self.next_event_no:
            return
        if event.event_no > self.next_event_no:
            self.fall_behind()
            return
        if len(self._events) >= self._max_num_events:
            self._behind = True
            return
        self._events.append(event)
        self.next_event_no += 1
        self._last_heard = self.quiet_since = self._loop.time()
        self._silence_s = self._max_silence_s
        self._wake()

    def put_log(self, events: Iterable[StreamEvent], *, is_all: bool) -> None:
        """Accepts events read from the log; `is_all` is False if the log may contain more."""
        for event in events:
            self.put(event)
        if not is_all:
            self.fall_behind()

    def fall_behind(self) -> None:
        """Makes `wants_log` true, because the log may have events that did not arrive here."""
        self._behind = True
        self._call_for_log()

    def fail(self, error: Exception) -> None:
        """Ends the delivery: once no event waits, `get` raises the error of the first call of this method."""
        self._error = self._error or error
        self._wake()

    def wants_log(self, now: float) -> bool:
        """True if the log must be read: no event waits, and one is missing or none came for a while."""
        if self._events or self._error is not None:
            return False
        return self._behind or now - self._last_heard >= self._silence_s

    def begin_log_read(self) -> None:
        """Records that a read of the log begins.

        If an event is found missing later, the log is read again.
        """
        self._behind = False
        # Each read that finds no new events doubles the pause before the next read, up to the maximum.
        self._last_heard = self._loop.time()
        self._silence_s = min(self._silence_s * 2, self._max_silence_s * MAX_SILENCE_FACTOR)

    async def get(self, until: float) -> list[StreamEvent]:
        """Returns the next events, or an empty list if none comes by `until` (event loop's time).

        Raises:
            Exception: the error that was passed to `fail`.
        """
        while True:
            if self._events:
                return self._take()
            if self._error is not None:
                raise self._error
            if self._loop.time() >= until:
                return []
            # A timer that rings earlier is kept, too: a new timer for each token would cost CPU time.
            if self._alarm is None or self._alarm.when() > until:
                self._set_alarm(until)
            self._waiter = self._loop.create_future()
            await self._waiter

    async def wait_for_event(self) -> None:
        """Returns when `get` has an event or an error; not to be called while `get` runs."""
        while not self._events and self._error is None:
            self._waiter = self._loop.create_future()
            await self._waiter

    def close(self) -> None:
        """Cancels the timer of the last `get`; to be called at the end of the HTTP exchange."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def _take(self) -> list[StreamEvent]:
        events, self._events = self._events, []
        self.quiet_since = self._loop.time()
        if self._behind:
            self._call_for_log()
        return events

    def _set_alarm(self, until: float) -> None:
        self.close()
        self._alarm = self._loop.call_at(until, self._ring)

    def _ring(self) -> None:
        self._alarm = None
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
