"""The failures of Redis as exceptions of ours."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import redis

from shared.errors import QueueOutOfMemory, QueueUnavailable
from shared.queue.not_now import code_of


@asynccontextmanager
async def queue_errors(until: float) -> AsyncIterator[None]:
    """Turns every failure of Redis inside, and the event loop's time passing `until`, into our exceptions.

    Raises:
        QueueOutOfMemory: the server refused to write for want of memory.
        QueueUnavailable: anything else.
    """
    try:
        async with asyncio.timeout_at(until):
            yield
    except (redis.RedisError, OSError) as error:
        if isinstance(error, redis.RedisError) and code_of(error) == "OOM":
            raise QueueOutOfMemory from error
        raise QueueUnavailable from error
