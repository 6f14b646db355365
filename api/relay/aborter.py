"""Aborts for clients that left: sent after the exchange, and again until Redis takes them."""

import asyncio
import logging

from api.relay.backoff import backoff
from api.relay.queue_client import QueueClient
from shared.errors import QueueUnavailable
from shared.logs import log_unexpected

logger = logging.getLogger(__name__)


class Aborter:
    """Tries each abort until Redis answers, or until its request has ended by itself."""

    def __init__(self, queue: QueueClient) -> None:
        self._queue = queue
        self._until: dict[str, float] = {}
        self._wanted = asyncio.Event()

    @property
    def is_busy(self) -> bool:
        """True while Redis has not taken all aborts."""
        return bool(self._until)

    def abort(self, request_id: str, until: float) -> None:
        """Gives a request up soon; tried until the event loop's time passes `until`."""
        self._until[request_id] = until
        self._wanted.set()

    async def run(self) -> None:
        """Works until it is cancelled."""
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
