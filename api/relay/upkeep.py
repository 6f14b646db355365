"""What an API process does at intervals, beside its exchanges."""

import asyncio
import logging
from collections.abc import Callable, Iterable

import redis

from api.relay.inbox import Inbox
from api.relay.queue_errors import queue_errors
from shared.errors import QueueUnavailable
from shared.logs import fields, log_unexpected
from shared.queue.api_streams import ApiStreams, EndLost
from shared.queue.permissions import API, describe, missing_rules
from shared.settings import ApiSettings

logger = logging.getLogger(__name__)

VANISH_CHECK_S = 2.0
PERMISSION_CHECK_S = 1.0
MIN_QUIET_S = 3.0
"""Silence after which it is asked whether a request still exists."""


async def renew_lease_forever(streams: ApiStreams, settings: ApiSettings) -> None:
    """Keeps this API alive in the eyes of the workers, which else abort what nobody reads."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            async with queue_errors(loop.time() + settings.redis_timeout_s):
                await streams.renew_lease(settings.api_lease_s)
            await asyncio.sleep(settings.api_lease_s / 3)
        except Exception as error:
            # Whatever it was, the lease must not lapse for it: all requests of this API would be aborted.
            if not isinstance(error, QueueUnavailable):
                log_unexpected(logger, error)
            await asyncio.sleep(min(0.5, settings.api_lease_s / 6))


async def watch_permissions(pool: redis.ConnectionPool, on_change: Callable[[str | None], None]) -> None:
    """Tells what permissions the API's user lacks, once Redis first answers, until it has them all.

    `on_change` gets the message for an operator, and None when nothing is missing.
    """
    said: str | None = None
    while True:
        try:
            rules = await asyncio.to_thread(missing_rules, pool, API)
        except (redis.RedisError, OSError):
            # The other tasks meet it too, and say so.
            await asyncio.sleep(PERMISSION_CHECK_S)
            continue
        if not rules:
            on_change(None)
            return
        message = describe(rules, pool.connection_kwargs.get("username"))
        if message != said:
            logger.error("%s", message, extra=fields("permission_missing"))
            said = message
            on_change(message)
        await asyncio.sleep(PERMISSION_CHECK_S)


async def fail_vanished_forever(
    streams: ApiStreams, settings: ApiSettings, inboxes: Callable[[], Iterable[Inbox]]
) -> None:
    """Ends the exchanges of requests that are no more: Redis came back empty, or an operator removed them."""
    loop = asyncio.get_running_loop()
    min_quiet_s = max(MIN_QUIET_S, settings.redis_timeout_s + 1)
    ended: set[str] = set()
    while True:
        await asyncio.sleep(VANISH_CHECK_S)
        now = loop.time()
        quiet = {inbox.request_id: inbox for inbox in inboxes() if now - inbox.quiet_since >= min_quiet_s}
        if not quiet:
            continue
        try:
            async with queue_errors(loop.time() + settings.redis_timeout_s):
                vanished = await streams.find_vanished(list(quiet))
        except Exception as error:
            if not isinstance(error, QueueUnavailable):
                log_unexpected(logger, error)
            continue
        for request_id, reason in vanished.items():
            # Its end may still be on its way: the log is read at intervals.
            if not isinstance(reason, EndLost) or request_id in ended:
                quiet[request_id].fail(reason)
        ended = {request_id for request_id, reason in vanished.items() if isinstance(reason, EndLost)}
