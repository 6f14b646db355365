"""Aborts the requests of clients that disconnected; retries each abort until Redis accepts it."""

import asyncio
import logging

from api.relay.backoff import backoff
from api.relay.queue_client import QueueClient
from shared.errors import QueueUnavailable
from shared.logs import log_unexpected

logger = logging.getLogger(__name__)


class Aborter:
    """Retries each abort until Redis answers, or until a deadline by which the request has ended anyway."""

    def __init__(self, queue: QueueClient) -> None:
        self._queue = queue
        self._until: dict[str, float] = {}
        self._wanted = asyncio.Event()

    @property
    def is_busy(self) -> bool:
        """True while there are aborts that Redis has not accepted."""
        return bool(self._until)

    def abort(self, request_id: str, until: float) -> None:
        """Schedules the abort of a request, which is retried until `until` (event loop's time)."""
        self._until[request_id] = until
        self._wanted.set()

    async def run(self) -> None:
        """Sends the scheduled aborts until this task is cancelled."""
        loop, pauses = asyncio.get_running_loop(), backoff()
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            for request_id, until in list(self._until.items()):
                try:
                    await self._queue.abort(request_id)
                except QueueUnavailable:
                    if loop.time() < until:
                        self._wanted.set()
                        await asyncio.sleep(next(pauses))
                        break
                except Exception as error:
                    log_unexpected(logger, error)
                pauses = backoff()
                del self._until[request_id]
