"""Giving requests up for clients that left: after the exchange, whatever Redis does."""

import asyncio
import logging
from collections.abc import Iterator

from api.relay.queue_errors import queue_errors
from shared.errors import QueueUnavailable
from shared.logs import log_unexpected
from shared.queue.api_streams import ApiStreams
from shared.settings import ApiSettings

logger = logging.getLogger(__name__)

MAX_BACKOFF_S = 1.0


class Aborter:
    """Tries each abort until Redis answers, or until its request has ended by itself."""

    def __init__(self, streams: ApiStreams, settings: ApiSettings) -> None:
        self._streams = streams
        self._settings = settings
        self._until: dict[str, float] = {}
        self._wanted = asyncio.Event()

    @property
    def is_busy(self) -> bool:
        """Whether an abort was not told yet."""
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
                    async with queue_errors(loop.time() + self._settings.redis_timeout_s):
                        await self._streams.abort(request_id)
                except QueueUnavailable:
                    if loop.time() < until:
                        self._wanted.set()
                        await asyncio.sleep(next(pauses))
                        break
                except Exception as error:
                    log_unexpected(logger, error)
                pauses = backoff()
                del self._until[request_id]


def backoff() -> Iterator[float]:
    """Pauses (s) between attempts, without end."""
    pause_s = 0.05
    while True:
        yield pause_s
        pause_s = min(pause_s * 2, MAX_BACKOFF_S)
