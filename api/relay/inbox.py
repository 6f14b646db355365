"""One request's events on their way to its HTTP exchange."""

import asyncio
from collections.abc import Callable, Iterable

from shared.messages import StreamEvent

MAX_SILENCE_FACTOR = 4
"""How much longer than the first silence the later ones may get while a request's log stays empty."""


class Inbox:
    """Delivers each event of one request exactly once, in order of `event_no`, to one consumer.

    `put` takes what pub/sub brings: late, twice, or with gaps. What it could not take (a gap, or a consumer
    so slow that `max_num_events` wait already) makes the inbox `behind`, and the rest comes from the log:
    whoever owns the inbox reads it from `next_event_no` when `wants_log` says so, and calls `put_log`.
    """

    def __init__(
        self, request_id: str, max_num_events: int, max_silence_s: float, call_for_log: Callable[[], None]
    ) -> None:
        self.request_id = request_id
        self.next_event_no = 0
        """The event that comes next; all before it were taken."""
        self._max_num_events = max_num_events
        self._max_silence_s = self._silence_s = max_silence_s
        self._call_for_log = call_for_log
        self._loop = asyncio.get_running_loop()
        self._last_heard = self.quiet_since = self._loop.time()
        self._events: list[StreamEvent] = []
        self._behind = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._alarm: asyncio.TimerHandle | None = None

    @property
    def num_waiting(self) -> int:
        """Events in memory that the consumer has not taken."""
        return len(self._events)

    def start_at(self, event_no: int) -> None:
        """Begins with this event instead of the first, read from the log."""
        self.next_event_no = event_no
        self.fall_behind()

    def put(self, event: StreamEvent) -> None:
        """Takes the next event; drops one it has, and any that it can't take in order."""
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
        """Takes what the log holds from `next_event_no`, at the time of the question, on."""
        for event in events:
            self.put(event)
        if not is_all:
            self.fall_behind()

    def fall_behind(self) -> None:
        """Something may be in the log that did not come here."""
        self._behind = True
        self._call_for_log()

    def fail(self, error: Exception) -> None:
        """Ends the delivery: `get` raises `error`. The first one counts."""
        self._error = self._error or error
        self._wake()

    def wants_log(self, now: float) -> bool:
        """Whether to read the log now: behind or silent, and with room for what it holds."""
        if self._events or self._error is not None:
            return False
        return self._behind or now - self._last_heard >= self._silence_s

    def log_is_being_read(self) -> None:
        """To be called before the log is read: what goes wrong from now on calls for another reading."""
        self._behind = False
        # A request that waits long is asked about less often; its first event ends that.
        self._last_heard = self._loop.time()
        self._silence_s = min(self._silence_s * 2, self._max_silence_s * MAX_SILENCE_FACTOR)

    async def get(self, until: float) -> list[StreamEvent]:
        """The next events, at least one; none when the event loop's time passed `until` first.

        Raises:
            Exception: the one given to `fail`.
        """
        while True:
            if self._error is not None:
                raise self._error
            if self._events:
                return self._take()
            if self._loop.time() >= until:
                return []
            await self._wait(until)

    def close(self) -> None:
        """Drops the alarm of a consumer that left."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def _take(self) -> list[StreamEvent]:
        events, self._events = self._events, []
        if self._behind:
            self._call_for_log()
        return events

    async def _wait(self, until: float) -> None:
        # One timer serves many tokens: it is left as it is while it rings no later than asked for.
        if self._alarm is None or self._alarm.when() > until:
            self.close()
            self._alarm = self._loop.call_at(until, self._ring)
        self._waiter = self._loop.create_future()
        await self._waiter

    def _ring(self) -> None:
        self._alarm = None
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
