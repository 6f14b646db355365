"""Whatever pub/sub and the log readings do, each event arrives once and in order."""

import asyncio
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.relay.inbox import Inbox
from shared.messages import StreamEvent

SOON_S = 0.01
FOREVER = float("inf")


def make_inbox(max_num_events: int = 100, call_for_log: Callable[[], None] = lambda: None) -> Inbox:
    return Inbox("id", max_num_events, 0.5, call_for_log)


def events(*numbers: int) -> list[StreamEvent]:
    return [StreamEvent(number) for number in numbers]


async def take(inbox: Inbox) -> list[int]:
    """The numbers that are there now."""
    return [event.event_no for event in await inbox.get(until=0)]


def read_log(inbox: Inbox, log: list[StreamEvent], page: int = 100) -> None:
    """Reads the log as the relay does."""
    first = inbox.next_event_no
    inbox.begin_log_read()
    found = log[first : first + page]
    inbox.put_log(found, is_all=len(found) < page)


# Steps of a delivery: the worker writes an event and publishes it or not, an old message comes (again),
# the log is asked for, the answer of an earlier question comes, the client takes the events that are there.
STEPS = st.lists(
    st.one_of(
        st.just(("write", True)),
        st.just(("write", False)),
        st.tuples(st.just("message"), st.integers(0, 50)),
        st.just(("ask", 0)),
        st.just(("answer", 0)),
        st.just(("take", 0)),
    ),
    max_size=60,
)


@given(steps=STEPS, max_num_events=st.integers(1, 5))
def test_every_event_arrives_once_and_in_order_whatever_is_lost_late_or_doubled(
    steps: list[tuple[str, int]], max_num_events: int
) -> None:
    async def play() -> None:
        inbox = make_inbox(max_num_events)
        log: list[StreamEvent] = []
        answers: list[list[StreamEvent]] = []
        taken: list[int] = []
        for action, argument in steps:
            if action == "write":
                log.append(StreamEvent(len(log)))
                if argument:
                    inbox.put(log[-1])
            elif action == "message" and log:
                inbox.put(log[argument % len(log)])
            elif action == "ask" and inbox.wants_log(FOREVER):
                inbox.begin_log_read()
                answers.append(log[inbox.next_event_no :][:max_num_events])
            elif action == "answer" and answers:
                answer = answers.pop(0)
                inbox.put_log(answer, is_all=len(answer) < max_num_events)
            elif action == "take":
                taken += await take(inbox)
            assert inbox.num_waiting <= max_num_events
            assert taken == list(range(len(taken)))
        while len(taken) < len(log):
            if inbox.wants_log(FOREVER):
                read_log(inbox, log, max_num_events)
            taken += await take(inbox)
        assert taken == list(range(len(log)))
        inbox.close()

    asyncio.run(play())


async def test_a_gap_calls_for_the_log_at_once() -> None:
    calls: list[None] = []
    inbox = make_inbox(call_for_log=lambda: calls.append(None))
    inbox.put(StreamEvent(1))
    assert calls
    assert inbox.wants_log(now=0)
    read_log(inbox, events(0, 1))
    assert await take(inbox) == [0, 1]
    assert not inbox.wants_log(now=0)


async def test_a_gap_noticed_while_the_log_is_read_calls_for_another_reading() -> None:
    inbox = make_inbox()
    inbox.begin_log_read()
    inbox.put(StreamEvent(5))
    inbox.put_log(events(0, 1), is_all=True)
    assert await take(inbox) == [0, 1]
    assert inbox.wants_log(now=0)


async def test_events_beyond_the_bound_are_dropped_and_called_for_when_the_client_catches_up() -> None:
    calls: list[None] = []
    inbox = make_inbox(max_num_events=2, call_for_log=lambda: calls.append(None))
    for event in events(0, 1, 2, 3):
        inbox.put(event)
    assert inbox.num_waiting == 2
    assert not inbox.wants_log(FOREVER)
    assert await take(inbox) == [0, 1]
    assert calls
    assert inbox.wants_log(now=0)


async def test_the_last_event_is_called_for_too_when_there_was_no_room_for_it() -> None:
    inbox = make_inbox(max_num_events=1)
    for event in events(0, 1):
        inbox.put(event)
    assert await take(inbox) == [0]
    assert inbox.wants_log(now=0)


async def test_a_silent_inbox_wants_the_log_less_and_less_often_until_an_event_comes() -> None:
    inbox = make_inbox()
    pauses = []
    for _ in range(4):
        now = asyncio.get_running_loop().time()
        pauses.append(next(pause for pause in (0.6, 1.1, 2.1) if inbox.wants_log(now + pause)))
        inbox.begin_log_read()
    assert pauses == [0.6, 1.1, 2.1, 2.1]
    inbox.put(StreamEvent(0))
    await take(inbox)
    assert inbox.wants_log(asyncio.get_running_loop().time() + 0.6)


async def test_get_returns_nothing_when_its_time_is_over() -> None:
    inbox = make_inbox()
    loop = asyncio.get_running_loop()
    for _ in range(2):
        until = loop.time() + SOON_S
        assert await inbox.get(until) == []
        assert loop.time() >= until
    inbox.close()


async def test_an_alarm_of_an_earlier_get_does_not_end_a_later_one() -> None:
    inbox = make_inbox()
    loop = asyncio.get_running_loop()
    waiting = asyncio.create_task(inbox.get(loop.time() + SOON_S))
    loop.call_soon(inbox.put, StreamEvent(0))
    assert len(await waiting) == 1
    until = loop.time() + 3 * SOON_S
    assert await inbox.get(until) == []
    assert loop.time() >= until


async def test_a_nearer_deadline_than_the_pending_alarm_is_kept() -> None:
    inbox = make_inbox()
    loop = asyncio.get_running_loop()
    waiting = asyncio.create_task(inbox.get(loop.time() + 1_000))
    loop.call_soon(inbox.put, StreamEvent(0))
    await waiting
    async with asyncio.timeout(100 * SOON_S):
        assert await inbox.get(loop.time() + SOON_S) == []
    inbox.close()


async def test_a_failure_wakes_the_client_and_comes_after_what_waits() -> None:
    inbox = make_inbox()
    waiting = asyncio.create_task(inbox.get(FOREVER))
    asyncio.get_running_loop().call_soon(inbox.fail, KeyError("first"))
    with pytest.raises(KeyError, match="first"):
        await waiting
    inbox.fail(ValueError("second"))
    inbox.put(StreamEvent(0))
    assert not inbox.wants_log(FOREVER)
    assert await take(inbox) == [0]
    with pytest.raises(KeyError, match="first"):
        await inbox.get(FOREVER)
