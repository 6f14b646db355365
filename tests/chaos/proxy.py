"""A TCP proxy between a component and the server, which breaks connections in the ways that networks do."""

import asyncio
import hashlib
import random
import re
import socket
import struct
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar

from shared.queue.scripts import script_source

CHUNK_BYTES = 65536
CALL_LIMIT_S = 10
COMMAND = re.compile(rb"(?:^|\r\n)\*\d+\r\n(?=\$)")

T = TypeVar("T")


def script_marker(name: str) -> bytes:
    """The bytes by which a call of a script is recognised: the script's SHA-1 in hex."""
    return hashlib.sha1(script_source(name).encode()).hexdigest().encode()


class Proxy:
    """Forwards connections to 127.0.0.1:`port`; all its methods may be called from any thread.

    A `with` statement starts and ends it. The component gets `url` in place of the server's URL.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._links: set[_Link] = set()
        self._open = {True: asyncio.Event(), False: asyncio.Event()}
        self._marker, self._num_to_swallow = b"", 0
        self._refusal: bytes | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="proxy")
        self._server: asyncio.Server | None = None
        self.port = 0
        """The port that the proxy listens on."""
        self.num_accepted = 0
        """Number of connections so far."""
        self.num_swallowed = 0
        """Number of replies swallowed so far."""

    @property
    def url(self) -> str:
        """The URL of the proxy, for `redis.Redis.from_url`."""
        return f"redis://127.0.0.1:{self.port}"

    @property
    def num_links(self) -> int:
        """Number of open connections."""
        return len(self._links)

    def reset_all(self) -> int:
        """Resets every connection, on both sides; returns their number."""
        return self._call(self._reset(1.0, random.Random(0)))

    def reset_some(self, rng: random.Random, share: float = 0.5) -> int:
        """Resets each connection with a probability of `share`; returns the number of those it reset."""
        return self._call(self._reset(share, rng))

    def hold(self, *, up: bool = True, down: bool = True) -> None:
        """Begins a black hole: bytes to the server (`up`) or from it (`down`) are held, without an error."""
        self._call(self._set_open(up=not up, down=not down))

    def release(self) -> None:
        """Ends the black hole: held bytes are forwarded in order."""
        self._call(self._set_open(up=True, down=True))

    def swallow_replies(self, marker: bytes, count: int = 1) -> None:
        """Lets the next commands with `marker` through, but resets the connection in place of a reply."""
        self._call(self._set_marker(marker, count))

    def refuse(self, reply: str | None) -> None:
        """Answers every command with this error itself, until called with None.

        Commands must be small, because the proxy counts the commands of one network read.
        """
        self._call(self._set_refusal(reply))

    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._start())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CALL_LIMIT_S)
        self._loop.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(CALL_LIMIT_S)

    async def _start(self) -> None:
        await self._set_open(up=True, down=True)
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        assert self._server is not None
        self._server.close()
        await self._set_open(up=True, down=True)
        await self._reset(1.0, random.Random(0))
        if others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others, timeout=CALL_LIMIT_S / 2)

    async def _set_open(self, *, up: bool, down: bool) -> None:
        for is_up, is_open in ((True, up), (False, down)):
            (self._open[is_up].set if is_open else self._open[is_up].clear)()

    async def _set_marker(self, marker: bytes, count: int) -> None:
        self._marker, self._num_to_swallow = marker, count

    async def _set_refusal(self, reply: str | None) -> None:
        self._refusal = None if reply is None else f"-{reply}\r\n".encode()

    async def _reset(self, share: float, rng: random.Random) -> int:
        hit = [link for link in list(self._links) if rng.random() < share]
        for link in hit:
            link.reset()
        return len(hit)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_accepted += 1
        try:
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            _abort(writer)
            return
        link = _Link(writer, server_writer)
        self._links.add(link)
        try:
            await asyncio.gather(
                self._pump(link, reader, server_writer, is_up=True),
                self._pump(link, server_reader, writer, is_up=False),
            )
        except OSError:
            link.reset()
        finally:
            self._links.discard(link)
            writer.close()
            server_writer.close()

    async def _pump(
        self, link: "_Link", reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_up: bool
    ) -> None:
        tail = b""
        while data := await reader.read(CHUNK_BYTES):
            await self._open[is_up].wait()
            if is_up and self._refusal is not None:
                link.refuse(self._refusal * len(COMMAND.findall(data)))
                continue
            if is_up:
                tail = self._look_for_marker(link, tail + data)
            elif link.swallows:
                self.num_swallowed += 1
                link.reset()
                return
            writer.write(data)
            await writer.drain()
        writer.close()

    def _look_for_marker(self, link: "_Link", data: bytes) -> bytes:
        """Notes a marked command; returns what may be the start of a marker."""
        if not self._num_to_swallow:
            return b""
        if self._marker in data:
            self._num_to_swallow -= 1
            link.swallows = True
            return b""
        return data[1 - len(self._marker) :]


class _Link:
    """One connection of a component, and the proxy's own one to the server."""

    def __init__(self, *writers: asyncio.StreamWriter) -> None:
        self._writers = writers
        self.swallows = False

    def refuse(self, replies: bytes) -> None:
        """Answers the component with the error."""
        self._writers[0].write(replies)

    def reset(self) -> None:
        for writer in self._writers:
            _abort(writer)


def _abort(writer: asyncio.StreamWriter) -> None:
    """Ends a connection with RST instead of FIN."""
    endpoint = writer.get_extra_info("socket")
    if endpoint is not None and endpoint.fileno() >= 0:
        endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
