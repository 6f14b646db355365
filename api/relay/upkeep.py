"""The periodic background tasks of an API process, which `Relay.start` in `api/relay/relay.py` starts.

A Batch API would add a loop here. The loop would run in only one API process at a time. It would enqueue
detached requests of `RequestClass.BATCH` with `QueueClient.enqueue`, whenever their queues have room. Traps:

* `api.relay` must not import `api.contract`. So the Batch API's route, not its loop, must turn the uploaded
  file into `GenerationRequest`s.
* `enqueue` has the same limits for interactive and batch requests. With these limits, a batch could fill a
  queue, and interactive clients would get 429: batch requests need a separate, lower limit.
* A batch request that loses its worker gets the rank `BEGAN` (`make_place` in
  `shared/queue/lua/waiting.lua`), above interactive requests. The rank `BEGAN` is meant for streams.
* `new_request` in `api/generation.py` has no parameter for the class.
* The `reader` key tells workers which API process gets a request's events. The key expires
  `QueueClient.exchange_limit_s` after the enqueue (by default 12 minutes), but a batch may wait longer.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable

import redis

from api.relay.inbox import Inbox
from api.relay.queue_client import QueueClient
from shared.errors import QueueUnavailable
from shared.logs import fields, log_unexpected
from shared.queue.api_streams import EndLost, TakenByOther
from shared.queue.permissions import API, describe, missing_rules
from shared.settings import ApiSettings

logger = logging.getLogger(__name__)

VANISH_CHECK_S = 2.0
PERMISSION_CHECK_S = 1.0
OVERDUE_CHECK_S = 5.0
MIN_QUIET_S = 3.0
"""Minimum time without an event that arrives or is taken, after which Redis is asked about a request."""


async def renew_lease_loop(queue: QueueClient, lease_s: float) -> None:
    """Renews this API process's lease; if it expired, workers would abort the requests of its clients."""
    while True:
        try:
            await queue.renew_lease()
            await asyncio.sleep(lease_s / 3)
        except Exception as error:
            # If an unforeseen exception ended this task, the lease would expire, and all requests be aborted.
            if not isinstance(error, QueueUnavailable):
                log_unexpected(logger, error)
            await asyncio.sleep(min(0.5, lease_s / 6))


async def watch_permissions(pool: redis.ConnectionPool, on_change: Callable[[str | None], None]) -> None:
    """Checks the permissions of the API's Redis user until none is missing.

    `on_change` gets a message for the operator whenever the set of missing ACL rules changes, and None once
    no rule is missing.
    """
    said: str | None = None
    while True:
        try:
            rules = await asyncio.to_thread(missing_rules, pool, API)
        except (redis.RedisError, OSError):
            # The task that reads the logs runs into this failure too, and logs it; no second line is needed.
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


async def fail_vanished_loop(
    queue: QueueClient, settings: ApiSettings, inboxes: Callable[[], Iterable[Inbox]]
) -> None:
    """Fails inboxes whose requests are gone, because Redis lost its data or an operator removed them."""
    min_quiet_s = max(MIN_QUIET_S, settings.redis_timeout_s + 1)
    ended: set[str] = set()
    while True:
        await asyncio.sleep(VANISH_CHECK_S)
        quiet = {inbox.request_id: inbox for inbox in inboxes() if inbox.is_quiet(min_quiet_s)}
        if not quiet:
            continue
        try:
            vanished = await queue.find_vanished(list(quiet))
        except Exception as error:
            if not isinstance(error, QueueUnavailable):
                log_unexpected(logger, error)
            continue
        for request_id, reason in vanished.items():
            if isinstance(reason, TakenByOther) and await _is_put_back(queue, request_id):
                continue
            # A request that has just ended is failed at the second check: its last event may still arrive.
            is_over = not isinstance(reason, EndLost) or request_id in ended
            if is_over and quiet[request_id].is_quiet(min_quiet_s):
                quiet[request_id].fail(reason)
        ended = {request_id for request_id, reason in vanished.items() if isinstance(reason, EndLost)}


async def _is_put_back(queue: QueueClient, request_id: str) -> bool:
    """Returns True if a request that a stock `rq worker` took is back on its queue, or may be."""
    try:
        state = await queue.take_back(request_id)
    except QueueUnavailable:
        return True
    if state == "queued":
        logger.warning(
            "request %s was taken by a worker of another class, and waits again: %s",
            request_id,
            TakenByOther().message,
            extra=fields("taken", request_id=request_id),
        )
    return state != "taken"


async def end_overdue_loop(queue: QueueClient, pause_s: float = OVERDUE_CHECK_S) -> None:
    """Ends requests that waited longer than their limit and whose clients and workers are gone.

    Clients and workers end overdue requests too. But if an API process was killed, or if no worker of a base
    is alive, requests would otherwise wait for ever, and count against the limits of their queues.
    """
    while True:
        try:
            for request_id in await queue.end_overdue(pause_s):
                logger.info(
                    "request %s ended: it waited longer than its limit",
                    request_id,
                    extra=fields("overdue", request_id=request_id),
                )
        except Exception as error:
            if not isinstance(error, QueueUnavailable):
                log_unexpected(logger, error)
        await asyncio.sleep(pause_s)
