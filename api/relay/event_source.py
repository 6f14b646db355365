"""Enqueues or resumes one request, returns its events, and enforces the limits of its wait in the queue."""

import asyncio
import math

from api.relay.inbox import Inbox
from api.relay.queue_client import QueueClient
from shared.errors import (
    GenerationFailed,
    LorelayError,
    NoWorker,
    QueueFull,
    QueueTimeout,
    QueueUnavailable,
    ServerDraining,
    from_info,
)
from shared.messages import FinishReason, GenerationRequest, StreamEvent
from shared.settings import ApiSettings

NUM_ABSENCES = 2
"""Number of successive checks without a live worker after which a request that waits ends."""
RETRY_S = 1.0
"""Pause before the next check of the queue, if Redis did not answer the previous check."""
GONE_WAIT_S = 5.0
"""Time for a request's last events to arrive, after Redis reported that the request has ended."""


class EventSource:
    """The source of one request's events."""

    def __init__(
        self, queue: QueueClient, inbox: Inbox, request: GenerationRequest, settings: ApiSettings
    ) -> None:
        self._queue = queue
        self._inbox = inbox
        self._request = request
        self._queue_time_limit_s = settings.queue_time_limit_s
        self._no_worker_wait_s = settings.no_worker_wait_s
        self._loop = asyncio.get_running_loop()
        self._check_at = self._limit_at = math.inf
        self._num_absences = 0
        self._was_gone = False
        self.has_ended = False
        """True once the request has ended: nothing is queued or runs under its id."""

    async def enqueue(self, client: str, until: float) -> None:
        """Puts the request on its queue.

        Raises:
            QueueFull, ServerDraining: the request was refused, and never runs.
            QueueUnavailable: Redis did not answer by `until`; the request may be in the queue anyway.
        """
        try:
            await self._queue.enqueue(self._request, client, until)
        except (QueueFull, ServerDraining):
            self.has_ended = True
            raise
        self._request = self._request.without_prompt()
        self._begin_wait()

    async def resume(self, first_event_no: int) -> None:
        """Makes `next` return the events of an already enqueued request, from `first_event_no` on."""
        await self._queue.attach(self._request.request_id)
        self._inbox.start_at(first_event_no)
        self._begin_wait()
        if first_event_no > 0:
            # The request has begun. If its worker is lost, the request may wait longer for another worker.
            self._check_at = self._limit_at

    def _begin_wait(self) -> None:
        self._limit_at = self._loop.time() + self._queue_time_limit_s
        self._check_soon()

    def _check_soon(self) -> None:
        self._check_at = min(self._limit_at, self._loop.time() + self._no_worker_wait_s / NUM_ABSENCES)

    async def next(self, until: float) -> list[StreamEvent]:
        """Returns the next events, or an empty list if none comes by `until` (event loop's time).

        Raises:
            QueueTimeout: no worker claimed the request in time; the request will never run.
            NoWorker: no live worker serves the model; the request will never run.
            GenerationFailed: somebody else removed the request.
        """
        while True:
            events = await self._inbox.get(min(until, self._check_at))
            if events:
                self._check_at = math.inf
                self.has_ended = events[-1].is_terminal
                return events
            if self._loop.time() >= self._check_at:
                await self._check_until_event()
            elif self._loop.time() >= until:
                return []

    async def _check_until_event(self) -> None:
        """Runs `_check_queue` until an event comes, because Redis may take seconds to answer.

        Raises:
            QueueTimeout, NoWorker, GenerationFailed: see `next`.
        """
        check = asyncio.ensure_future(self._check_queue())
        arrival = asyncio.ensure_future(self._inbox.wait_for_event())
        try:
            await asyncio.wait((check, arrival), return_when=asyncio.FIRST_COMPLETED)
            if check.done():
                check.result()
        finally:
            check.cancel()
            arrival.cancel()

    async def _check_queue(self) -> None:
        """Removes the request from its queue if its wait is over, unless a worker has claimed it."""
        try:
            if self._loop.time() < self._limit_at and not await self._is_without_worker():
                self._check_soon()
                return
            state = await self._queue.abort_queued(self._request.request_id)
        except QueueUnavailable:
            self._check_at = self._loop.time() + RETRY_S
            return
        if state == "queued":
            self.has_ended = True
            raise await self._queue_timeout()
        if state == "running":
            self._check_at = math.inf
            return
        if self._was_gone:
            self.has_ended = True
            raise GenerationFailed("The request was removed from the queue.")
        self._was_gone = True
        self._check_at = self._loop.time() + GONE_WAIT_S
        self._inbox.fall_behind()

    async def _is_without_worker(self) -> bool:
        """Returns True after `NUM_ABSENCES` successive checks that found no live worker for the model."""
        has_worker = await self._queue.has_live_worker(self._request)
        self._num_absences = 0 if has_worker else self._num_absences + 1
        return self._num_absences >= NUM_ABSENCES

    async def _queue_timeout(self) -> QueueTimeout:
        is_over = self._loop.time() >= self._limit_at
        try:
            has_worker = is_over and await self._queue.has_live_worker(self._request)
        except QueueUnavailable:
            has_worker = True
        limit_s = self._queue_time_limit_s if is_over else self._no_worker_wait_s
        if has_worker:
            return QueueTimeout(f"The request was not started within {limit_s:g} s; try again later.")
        return NoWorker(
            f"No worker serves '{self._request.model}' at the moment: none came within {limit_s:g} s."
        )


def error_of(event: StreamEvent) -> LorelayError | None:
    """Returns the error that an event reports, or None."""
    if event.error is not None:
        return from_info(event.error)
    if event.finish_reason is None:
        return None
    if event.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
        return GenerationFailed(f"The generation ended with '{event.finish_reason}'.")
    return None
