"""What an API process does at intervals, beside its exchanges."""

import asyncio
from collections.abc import Callable, Iterable

from api.errors import log_unexpected, queue_errors
from api.inbox import Inbox
from shared.api_streams import ApiStreams
from shared.errors import QueueUnavailable
from shared.settings import ApiSettings

VANISH_CHECK_S = 2.0
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
                log_unexpected(error)
            await asyncio.sleep(min(0.5, settings.api_lease_s / 6))


async def fail_vanished_forever(
    streams: ApiStreams, settings: ApiSettings, inboxes: Callable[[], Iterable[Inbox]]
) -> None:
    """Ends the exchanges of requests that are no more: Redis came back empty, or an operator removed them."""
    loop = asyncio.get_running_loop()
    min_quiet_s = max(MIN_QUIET_S, settings.redis_timeout_s + 1)
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
                log_unexpected(error)
            continue
        for request_id, reason in vanished.items():
            quiet[request_id].fail(reason)
