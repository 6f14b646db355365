"""uvicorn's connection class, extended by a limit on the size of heads and by OpenAI's error format."""

import asyncio
import http
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from api.errors import error_response
from api.exchange_log import REQUEST_ID, ExchangeLog
from api.layers import labelled
from shared.errors import HeadersTooLarge, InvalidRequest, LorelayError, RequestTimeout

if TYPE_CHECKING:
    from api.connections import ConnectionGuard

MAX_HEAD_BYTES = 64 * 1024
"""Maximum size of a request's line and headers, and of its trailers."""


@dataclass(slots=True)
class Progress:
    """The start times of what a connection is doing; None for everything that it is not doing."""

    head_since: float | None = None
    body_since: float | None = None
    refused_since: float | None = None
    stalled_since: float | None = None
    """Time of the last sweep after which the client read something."""
    num_unsent: int = 0
    """Number of bytes that waited for the client at the last sweep."""


class Connection(HttpToolsProtocol):
    """One connection of a client, within the limits of a `ConnectionGuard`."""

    def __init__(self, guard: "ConnectionGuard", **options: Any) -> None:
        """Creates the protocol with uvicorn's `options`."""
        super().__init__(**options)
        self.ws_protocol_class = None
        self.app = guard.protect(self.app)
        self.progress = Progress()
        self._guard = guard
        self._cycles: deque[RequestResponseCycle] = deque()
        """The requests on the connection whose responses are not complete, oldest first."""
        self._num_head_bytes = 0
        self._num_unparsed_bytes = 0
        """Bytes that came since the parser last completed a head, a piece of a body or a request."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts the time limit of the first request's head."""
        super().connection_made(transport)
        self.progress.head_since = self._guard.clock()
        self._guard.admit(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets the connection."""
        super().connection_lost(exc)
        self._end_cycles()
        self._guard.forget(self)

    def data_received(self, data: bytes) -> None:
        """Parses the data that the client sent, unless the client was refused already."""
        if self.progress.refused_since is not None:
            return
        if not self._cycles and self.progress.body_since is None and self.progress.head_since is None:
            self.progress.head_since = self._guard.clock()
        self._num_unparsed_bytes += len(data)
        super().data_received(data)
        if self._num_unparsed_bytes > MAX_HEAD_BYTES and self.parser is not None:
            self.refuse(HeadersTooLarge())

    def on_message_begin(self) -> None:
        """Begins a request."""
        super().on_message_begin()
        self._num_head_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Adds a piece of the URL."""
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Adds a header or trailer."""
        self._count_head(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Begins the body, and starts the application."""
        self._num_unparsed_bytes = 0
        self.progress.head_since = None
        if not self._cycles:
            self._begin_body()
        super().on_headers_complete()
        self._num_head_bytes = 0
        self._cycles.append(self.cycle)

    def on_body(self, body: bytes) -> None:
        """Adds a piece of the body."""
        self._num_unparsed_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Ends the request."""
        self._num_unparsed_bytes = 0
        self.progress.body_since = None
        self._guard.note_busy(self)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Ends the response. The connection then waits for the next request, or runs it if it has arrived.

        If a part of the next request arrived during the response, the time limits of this request begin now,
        because the client may have waited for the response.
        """
        if self._cycles:
            self._cycles.popleft()
        super().on_response_complete()
        if self._cycles:
            if len(self._cycles) == 1 and self._cycles[0].more_body:
                self._begin_body()
            return
        self._guard.note_waiting(self)
        is_head = self.progress.body_since is None and self.progress.refused_since is None
        if is_head and (self._num_head_bytes or self._num_unparsed_bytes):
            self.progress.head_since = self._guard.clock()

    def _begin_body(self) -> None:
        self.progress.body_since = self._guard.clock()
        self._guard.note_arriving(self)

    def send_400_response(self, msg: str) -> None:
        """Answers a request that the parser or `_count_head` refused."""
        is_too_large = self._num_head_bytes > MAX_HEAD_BYTES
        self.refuse(
            HeadersTooLarge() if is_too_large else InvalidRequest("This is not a valid HTTP request.")
        )

    def refuse(self, error: LorelayError) -> None:
        """Answers with an error, if no response has begun, and closes the connection soon."""
        self.progress = Progress(refused_since=self._guard.clock())
        self._guard.note_waiting(self)
        has_begun = any(cycle.response_started for cycle in self._cycles)
        self._end_cycles()
        if has_begun:
            self.transport.close()
        else:
            self.transport.write(_render(error))
            self.flow.resume_reading()

    def _end_cycles(self) -> None:
        """Tells the application that nobody receives its responses.

        uvicorn itself tells the application only about the last request of the connection, even if earlier
        requests still run.
        """
        for cycle in self._cycles:
            cycle.disconnected = True
            cycle.message_event.set()

    def end_head(self) -> None:
        """Closes a connection that has no complete head.

        If a part of the head has come, sends an error first.
        """
        if self._num_head_bytes or self._num_unparsed_bytes:
            self.refuse(RequestTimeout())
        else:
            self.transport.close()

    def _count_head(self, num_bytes: int) -> None:
        self._num_head_bytes += num_bytes
        if self._num_head_bytes > MAX_HEAD_BYTES:
            # The parser turns any exception of a callback into one of its own, which uvicorn answers.
            raise httptools.HttpParserCallbackError


def _render(error: LorelayError) -> bytes:
    """Returns the HTTP response for an error that is found before the application gets the request."""
    response = error_response(error)
    head = b"HTTP/1.1 %d %s\r\n" % (
        response.status_code,
        http.HTTPStatus(response.status_code).phrase.encode(),
    )
    log = ExchangeLog({"method": "(no complete request)"})
    log.note_error(error, response.status_code)
    log.note_status(response.status_code)
    log.write()
    headers = [*response.raw_headers, (REQUEST_ID, log.request_id.encode()), (b"connection", b"close")]
    lines = [b"%s: %s\r\n" % (name, labelled(name, value)) for name, value in headers]
    return head + b"".join(lines) + b"\r\n" + bytes(response.body)
