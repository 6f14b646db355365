"""Hostile clients: the bytes that they send to an API, and a process that runs the clients.

`python -m bench.hostile_inputs --url URL --model MODEL --connections N NAME…` prints `ready`. A line on its
standard input starts the attack: the process then keeps N connections open, which send the named inputs. The
next line ends the attack, and the process prints as JSON how many connections ended in each way.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import resource
import socket
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from bench.load import WORDS

CHAT = "/v1/chat/completions"
LARGE_FILE = "/docs-assets/swagger-ui-bundle.js"
MAX_NUM_BYTES = 300_000_000
"""Number of bytes after which an endless input ends although the API still takes it."""
RETRY_S = 0.02
"""Pause between two tries of one client; without it, refusals would mostly measure the client."""
NICENESS = 10
"""Niceness of the process: attackers usually have machines of their own, and don't use the server's cores."""
SMALL_BUFFER = 4096
READY = "ready"
CUT = "no answer"
OPEN = "open at the end"


class Target(NamedTuple):
    """The API that hostile clients call, and what their requests need to be valid."""

    url: str
    model: str
    api_key: str = "none"
    num_long_words: int = 4000
    """Number of words in a long prompt, which should just fit the model's context."""
    num_long_tokens: int = 2000
    """Number of tokens of a long answer."""


class Sent(NamedTuple):
    """The bytes of one connection."""

    first: bytes = b""
    more: bytes = b""
    """Bytes that follow again and again, until the API answers or closes the connection."""


class Manner(Enum):
    """The behavior of a client once it has sent its bytes."""

    READ = "reads until the API closes the connection"
    LEAVE = "closes the connection as soon as the answer begins"
    IGNORE = "never reads"


@dataclass(frozen=True)
class HostileInput:
    """One kind of hostile client."""

    sent: Callable[[Target], Sent]
    num_connections: int = 1
    """Number of connections at a time that make it hostile."""
    manner: Manner = Manner.READ


def _post(target: Target, body: bytes, *, announced: int | None = None) -> bytes:
    """Builds a chat request; `announced` is its content length if the body is shorter."""
    lines = [
        f"POST {CHAT} HTTP/1.1",
        f"host: {urlsplit(target.url).netloc}",
        f"authorization: Bearer {target.api_key}",
        "content-type: application/json",
        "connection: close",
        f"content-length: {len(body) if announced is None else announced}",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


def _body(build: Callable[[], bytes | dict[str, Any]], num_connections: int = 1) -> HostileInput:
    """Describes a client that sends a body: bytes, or a chat request with these fields."""

    def sent(target: Target) -> Sent:
        body = build()
        return Sent(_post(target, body if isinstance(body, bytes) else _chat(target, **body)))

    return HostileInput(sent, num_connections)


def _fields(begin: bytes, end: bytes) -> HostileInput:
    """Describes a client that sends a chat request with 300,000 more fields between `begin` and `end`."""

    def sent(target: Target) -> Sent:
        fields = b",".join(b'"k%d":1' % number for number in range(300_000))
        return Sent(_post(target, _chat(target).removesuffix(b"}") + begin + fields + end))

    return HostileInput(sent)


def _chat(target: Target, **fields: Any) -> bytes:
    hello = {"model": target.model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    return json.dumps(hello | fields, separators=(",", ":")).encode()


def _messages(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", **message} for message in messages]}


def _text(num_words: int) -> str:
    return " ".join(itertools.islice(itertools.cycle(WORDS), num_words))


def _head(first: bytes, more: bytes = b"", num_connections: int = 1) -> HostileInput:
    return HostileInput(lambda target: Sent(first, more), num_connections)


def _stream(manner: Manner, num_connections: int) -> HostileInput:
    """Describes a client that asks for a long answer as a stream."""

    def sent(target: Target) -> Sent:
        fields = {"max_tokens": target.num_long_tokens, "ignore_eos": True, "stream": True}
        return Sent(_post(target, _chat(target, **fields)))

    return HostileInput(sent, num_connections, manner)


def _long_prompt(target: Target) -> Sent:
    return Sent(_post(target, _chat(target, **_messages({"content": _text(target.num_long_words)}))))


_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": ""}}
_CALLS = {"role": "assistant", "tool_calls": [_CALL] * 5}
_PART = {"type": "text", "text": ""}
_GET = b"GET /health HTTP/1.1\r\nhost: x\r\n"
_CHUNKED = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n"

BODIES = {
    "unknown fields": _fields(b",", b"}"),
    "metadata": _fields(b',"metadata":{', b"}}"),
    "empty text parts": _body(lambda: _messages({"content": [_PART] * 130_000})),
    "tool calls": _body(lambda: _messages(*[_CALLS] * 10_000)),
    "empty lists": _body(lambda: {"stop": [[]] * 1_000_000}),
    "nested lists": _body(lambda: b"[" * 4_000_000),
    "escapes": _body(lambda: _messages({"content": '\\",' * 600_000})),
    "no JSON": _body(lambda: b"\xff" * 4_000_000),
    "a body of 8 MB": _body(lambda: b" " * 8_000_000),
    "10,000 messages": _body(lambda: _messages(*[{"content": "x" * 300}] * 10_000)),
}
HEADS = {
    "an endless header": _head(_GET + b"a: ", b"x" * 65_536),
    "endless headers": _head(_GET, b"a: b\r\n" * 10_000),
    "endless trailers": _head(_CHUNKED, b"a: b\r\n" * 10_000),
    "an endless path": _head(b"GET /", b"x" * 65_536),
}
CONNECTIONS = {
    "idle connections": _head(b"", num_connections=1_100),
    "unfinished heads": _head(_GET, num_connections=150),
    "unfinished bodies": HostileInput(
        lambda target: Sent(_post(target, b" " * 4_000_000, announced=4_100_000)), num_connections=150
    ),
}
NOT_READ = {
    "unread streams": _stream(Manner.IGNORE, num_connections=20),
    "unread files": HostileInput(
        lambda target: Sent(f"GET {LARGE_FILE} HTTP/1.1\r\nhost: x\r\n\r\n".encode() * 20), 20, Manner.IGNORE
    ),
    "clients that leave": _stream(Manner.LEAVE, num_connections=20),
}
LONG_PROMPTS = {
    "prompts over the context": _body(lambda: _messages({"content": _text(520_000)}), num_connections=50),
    "prompts that fill the context": HostileInput(_long_prompt, num_connections=50),
}
INPUTS: dict[str, HostileInput] = BODIES | HEADS | CONNECTIONS | NOT_READ | LONG_PROMPTS
"""All hostile inputs by name."""


class Crowd:
    """Hostile clients that send the named inputs in turn.

    Each client opens a new connection when its connection has ended.
    """

    def __init__(self, target: Target, names: Sequence[str], num_connections: int) -> None:
        """Builds all bytes in advance, so that this takes no time during the attack."""
        address = urlsplit(target.url)
        self._address = (address.hostname or "", address.port or 80)
        sent = {name: INPUTS[name].sent(target) for name in names}
        turns = itertools.islice(itertools.cycle(names), num_connections)
        self._clients = [(sent[name], INPUTS[name].manner) for name in turns]

    async def play(self, end: Awaitable[object]) -> Counter[str]:
        """Attacks until `end` is done, and returns how many connections ended in each way.

        The ways are an HTTP status, `CUT`, and `OPEN` for connections that were open at the end.
        """
        ways: Counter[str] = Counter()

        async def repeat(sent: Sent, manner: Manner) -> None:
            while True:
                ways[await self._meet(sent, manner)] += 1
                await asyncio.sleep(RETRY_S)

        tasks = [asyncio.create_task(repeat(*client)) for client in self._clients]
        await end
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if not isinstance(result, asyncio.CancelledError):
                raise RuntimeError("a hostile client ended by itself") from result
        return ways + Counter({OPEN: len(tasks)})

    async def _meet(self, sent: Sent, manner: Manner) -> str:
        """Runs one connection; returns how it ended."""
        try:
            reader, writer = await self._connect(manner)
        except OSError:
            return CUT
        answer = asyncio.create_task(_status(reader, manner))
        try:
            # The API may answer and close the connection before it has got everything.
            with contextlib.suppress(OSError):
                await _send(writer, sent, answer)
            return await answer
        finally:
            answer.cancel()
            writer.transport.abort()

    async def _connect(self, manner: Manner) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        family = socket.AF_INET6 if ":" in self._address[0] else socket.AF_INET
        client = socket.socket(family, socket.SOCK_STREAM)
        try:
            client.setblocking(False)
            if manner is Manner.IGNORE:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
            await asyncio.get_running_loop().sock_connect(client, self._address)
            return await asyncio.open_connection(sock=client, limit=SMALL_BUFFER)
        except BaseException:
            client.close()
            raise


async def _send(writer: asyncio.StreamWriter, sent: Sent, answer: "asyncio.Task[str]") -> None:
    """Sends all bytes, but stops once the answer has come."""
    writer.write(sent.first)
    await writer.drain()
    num_bytes = 0
    while sent.more and num_bytes < MAX_NUM_BYTES and not answer.done():
        writer.write(sent.more)
        await writer.drain()
        num_bytes += len(sent.more)


async def _status(reader: asyncio.StreamReader, manner: Manner) -> str:
    """Reads the answer in this client's manner; returns its HTTP status, or `CUT` if there is none."""
    if manner is Manner.IGNORE:
        await asyncio.Event().wait()
    beginning = b""
    with contextlib.suppress(OSError):
        while piece := await reader.read(1 << 16):
            beginning += piece[: 64 - len(beginning)]
            if manner is Manner.LEAVE:
                break
    words = beginning.split()
    return words[1].decode(errors="replace") if len(words) > 1 else CUT


async def _play_on_orders(crowd: Crowd) -> None:
    """Starts an attack at a line on standard input, ends the attack at the next line, and so on."""
    loop = asyncio.get_running_loop()

    def order() -> Awaitable[str]:
        return loop.run_in_executor(None, sys.stdin.readline)

    while await order():
        _say(json.dumps(await crowd.play(order())))


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--url", required=True, help="without /v1")
    parser.add_argument("--model", required=True)
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--connections", type=int, required=True)
    parser.add_argument("names", nargs="+", choices=INPUTS, metavar="NAME")
    args = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    os.nice(NICENESS)
    crowd = Crowd(Target(args.url, args.model, args.api_key), args.names, args.connections)
    _say(READY)
    asyncio.run(_play_on_orders(crowd))


if __name__ == "__main__":
    main()
