"""The bench of hostile inputs: what the inputs are, how they are played, and how gaps become a verdict."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from bench.hostile import CROWD, HEADINGS, Result, Round, gaps_between, p99
from bench.hostile_inputs import BODIES, CONNECTIONS, CUT, HEADS, INPUTS, LONG_PROMPTS, OPEN, Crowd, Target
from shared.settings import ApiSettings
from tests.waiting import wait_until

TARGET = Target("http://127.0.0.1:1", "m", "sk-hostile")
MAX_BODY_BYTES = ApiSettings.model_fields["max_body_bytes"].default
NO_JSON = {"nested lists", "no JSON", "a body of 8 MB"}
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def test_only_one_body_is_larger_than_an_api_takes() -> None:
    too_large = []
    for name in BODIES | LONG_PROMPTS:
        head, _, body = INPUTS[name].sent(TARGET).first.partition(b"\r\n\r\n")
        assert f"content-length: {len(body)}".encode() in head
        assert b"Bearer sk-hostile" in head
        if len(body) > MAX_BODY_BYTES:
            too_large.append(name)
        elif name not in NO_JSON:
            assert body.startswith(b'{"model":"m"')
    assert too_large == ["a body of 8 MB"]


def test_unfinished_inputs_never_end_their_head_or_body() -> None:
    for name in HEADS.keys() | {"unfinished heads"}:
        sent = INPUTS[name].sent(TARGET)
        assert not (sent.first + sent.more).endswith(b"\r\n\r\n")
    head, _, body = INPUTS["unfinished bodies"].sent(TARGET).first.partition(b"\r\n\r\n")
    assert f"content-length: {len(body)}".encode() not in head
    assert not CONNECTIONS["idle connections"].sent(TARGET).first


@asynccontextmanager
async def serving(serve: Serve) -> AsyncIterator[Target]:
    """Runs a server that treats each connection in the same way."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        except ConnectionError:
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        yield Target(f"http://127.0.0.1:{port}", "m")


async def ways(name: str, serve: Serve, end: Callable[[], bool]) -> Counter[str]:
    """Plays one client of an input until `end` is true; returns how its connections ended."""
    async with serving(serve) as target:
        return await Crowd(target, [name], 1).play(asyncio.to_thread(wait_until, end))


async def test_an_endless_head_ends_with_the_refusal_and_begins_anew() -> None:
    num_refused = 0

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_refused
        await reader.readexactly(200_000)
        writer.write(b"HTTP/1.1 431 Too Large\r\n\r\n")
        await writer.drain()
        num_refused += 1

    found = await ways("an endless header", refuse, lambda: num_refused >= 3)
    assert set(found) == {"431", OPEN}
    assert found["431"] >= 2


async def test_clients_that_leave_close_the_connection_when_the_answer_begins() -> None:
    num_left = 0

    async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_left
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        try:
            while await reader.read(65536):
                pass
        finally:
            num_left += 1

    found = await ways("clients that leave", stream, lambda: num_left >= 2)
    assert found["200"] >= 1


async def test_clients_that_never_read_hold_up_the_server_until_the_end() -> None:
    is_full = False

    async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal is_full
        while writer.transport.get_write_buffer_size() < 65_536:
            writer.write(b"x" * 65_536)
            await asyncio.sleep(0)
        is_full = True
        await reader.read(-1)

    assert await ways("unread streams", stream, lambda: is_full) == {OPEN: 1}


async def test_connections_that_the_api_closes_without_an_answer_are_counted_apart() -> None:
    num_closed = 0

    async def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_closed
        num_closed += 1

    found = await ways("idle connections", close, lambda: num_closed >= 3)
    assert set(found) == {CUT, OPEN}


async def test_a_crowd_has_connections_of_every_input_in_turn() -> None:
    heads: list[bytes] = []

    async def record(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.read(11))
        await asyncio.Event().wait()

    async with serving(record) as target:
        end = asyncio.to_thread(wait_until, lambda: len(heads) == 4)
        found = await Crowd(target, ["unfinished heads", "unread files", "unread streams"], 4).play(end)
    assert Counter(head.split(b" ")[1][:4] for head in heads) == {b"/hea": 2, b"/doc": 1, b"/v1/": 1}
    assert found == {OPEN: 4}


def test_a_gap_counts_if_any_part_of_it_lies_in_the_time_that_is_watched() -> None:
    times = [0.0, 1.0, 3.0, 4.0, 9.0, 10.0]
    assert gaps_between(times, 2.0, 5.0) == [2.0, 1.0, 5.0]
    assert gaps_between(times, 5.0, 6.0) == [5.0]


def test_the_99th_percentile_leaves_out_one_value_of_a_hundred() -> None:
    assert p99([*range(99), 1000]) == 98
    assert p99([1.0]) == 1.0


@pytest.mark.parametrize(
    ("name", "last", "verdict"),
    [
        ("metadata", Round([0.02], [0.07]), "ok"),
        ("metadata", Round([0.02], [0.08]), "short"),
        (CROWD, Round([0.25], [0.75]), "ok"),
        (CROWD, Round([0.25], [0.76]), "short"),
    ],
)
def test_every_run_must_keep_within_the_mark_of_its_row(name: str, last: Round, verdict: str) -> None:
    assert Result(name, [Round([0.02], [0.02]), last]).verdict == verdict


def test_a_row_with_a_failed_request_is_not_ok_whatever_its_gaps() -> None:
    result = Result(CROWD, [Round([0.02], [0.02])], faults=["503: full\nmore", "broken"])
    assert result.verdict == "2 failed: 503: full"


def test_a_row_shows_a_time_per_run_and_how_far_memory_rose() -> None:
    rounds = [Round([0.02, 0.02], [0.03, 0.04]), Round([0.02], [0.05])]
    growth = {"API": 1.2, "worker": 0.0, "Redis": 30.0}
    result = Result("metadata", rounds, growth, Counter({"400": 3}))
    expected = ["metadata", "20/20", "40/50", "20/20", "40/50", "+1", "+0", "+30", "ok", "3 400"]
    assert result.cells == expected
    assert len(Result("metadata", faults=["it did not start"]).cells) == len(HEADINGS)
