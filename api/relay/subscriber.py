"""The pub/sub subscription over which an API process gets its events."""

import asyncio
import logging
from collections.abc import Callable

import redis
from redis.asyncio.client import PubSub

from api.relay.backoff import backoff
from shared.logs import log_unexpected
from shared.queue.connections import connect_async
from shared.queue.outages import Outages
from shared.settings import RedisSettings

logger = logging.getLogger(__name__)

PING_S = 5.0
"""Time without messages after which the connection is pinged; also the time to wait for the reply."""


class Subscriber:
    """Keeps one connection subscribed to one channel and passes each message to a callback."""

    def __init__(
        self,
        redis_settings: RedisSettings,
        channel: str,
        *,
        subscribe_limit_s: float,
        outages: Outages,
        ping_s: float = PING_S,
    ) -> None:
        self._connection = connect_async(redis_settings, max_num_retries=0)
        self._channel = channel
        self._subscribe_limit_s = subscribe_limit_s
        self._outages = outages
        self._ping_s = ping_s

    async def run(self, on_message: Callable[[bytes], None], on_subscribed: Callable[[], None]) -> None:
        """Receives messages until this task is cancelled; calls `on_subscribed` after each (re)connection."""
        pauses = backoff()
        while True:
            try:
                async with self._connection.pubsub() as pubsub:
                    await self._subscribe(pubsub)
                    pauses = backoff()
                    await self._receive(pubsub, on_message, on_subscribed)
            except (redis.RedisError, OSError) as error:
                self._outages.begin("subscriber", error)
            except Exception as error:
                log_unexpected(logger, error)
            await asyncio.sleep(next(pauses))

    async def close(self) -> None:
        """Closes the connection."""
        await self._connection.aclose()

    async def _subscribe(self, pubsub: PubSub) -> None:
        async with asyncio.timeout(self._subscribe_limit_s):
            await pubsub.subscribe(self._channel)

    async def _receive(
        self, pubsub: PubSub, on_message: Callable[[bytes], None], on_subscribed: Callable[[], None]
    ) -> None:
        """Passes messages on until the connection fails.

        Raises:
            TimeoutError: the server did not answer a ping, although the connection looks alive.
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
                on_message(message["data"])
            elif message["type"] == "subscribe":
                self._outages.end("subscriber")
                on_subscribed()
