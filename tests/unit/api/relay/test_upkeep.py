"""The background tasks of an API process leave alone the requests whose clients only read slowly."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import cast

import pytest

from api.relay import upkeep
from api.relay.inbox import Inbox
from api.relay.queue_client import QueueClient
from shared.messages import StreamEvent, Usage
from shared.queue.api_streams import EndLost
from shared.settings import ApiSettings

LONG_AGO = float("-inf")
LAST = StreamEvent(1, usage=Usage(1, 1))


class EndedQueue:
    """Reports every request as ended without a last event."""

    def __init__(self, on_check: Callable[[int], None]) -> None:
        self.num_checks = 0
        self._on_check = on_check

    async def find_vanished(self, request_ids: Sequence[str]) -> dict[str, EndLost]:
        self.num_checks += 1
        self._on_check(self.num_checks)
        return {request_id: EndLost() for request_id in request_ids}


def make_inbox(request_id: str) -> Inbox:
    inbox = Inbox(request_id, 2, 0.5, lambda: None)
    inbox.put(StreamEvent(0))
    return inbox


async def fail_vanished(
    monkeypatch: pytest.MonkeyPatch, inbox: Inbox, on_check: Callable[[int], None] = lambda _: None
) -> None:
    """Runs the loop until it has failed another request, which has no event at all."""
    monkeypatch.setattr(upkeep, "VANISH_CHECK_S", 0)
    lost = Inbox("lost", 2, 0.5, lambda: None)
    lost.quiet_since = LONG_AGO
    queue = cast("QueueClient", EndedQueue(on_check))
    async with asyncio.TaskGroup() as group:
        loop = group.create_task(upkeep.fail_vanished_loop(queue, ApiSettings(), lambda: [inbox, lost]))
        with contextlib.suppress(EndLost):
            await lost.get(float("inf"))
        loop.cancel()


async def test_a_request_whose_events_wait_for_a_slow_client_is_not_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inbox = make_inbox("slow")
    inbox.put(LAST)
    inbox.quiet_since = LONG_AGO
    await fail_vanished(monkeypatch, inbox)
    assert await inbox.get(0) == [StreamEvent(0), LAST]
    assert await inbox.get(0) == []


async def test_a_request_whose_client_has_just_taken_events_is_not_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inbox = make_inbox("slow")
    inbox.quiet_since = LONG_AGO
    await inbox.get(0)
    await fail_vanished(monkeypatch, inbox)
    assert await inbox.get(0) == []


async def test_an_event_that_arrives_during_the_check_keeps_its_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inbox = make_inbox("slow")
    await inbox.get(0)
    inbox.quiet_since = LONG_AGO
    await fail_vanished(monkeypatch, inbox, lambda number: inbox.put(LAST) if number == 2 else None)
    assert await inbox.get(0) == [LAST]
    assert await inbox.get(0) == []
