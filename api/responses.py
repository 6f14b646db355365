"""The HTTP response to one generation request: enqueues the request and sends its events to the client."""

import asyncio
import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.contract.answer import AnswerWriter
from api.contract.server_events import DONE, PAUSED_COMMENT, QUEUED_COMMENT, render_data, render_resumption
from api.errors import mapped, render_error
from api.exchange_log import CLIENT_CLOSED_REQUEST, ExchangeLog, exchange_of
from api.relay.event_source import EventSource, error_of
from api.relay.inbox import Inbox
from api.relay.relay import Relay
from shared.errors import GenerationTimeout, InvalidRequest, LorelayError, ServerDraining
from shared.logs import log_unexpected
from shared.messages import GenerationRequest
from shared.settings import ApiSettings

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 10.0
"""Time without events after which an open stream gets a comment line, which keeps its connection alive."""
LAST_WORDS_S = 1.0
"""Maximum time for sending the error that ends a stream to a client that reads slowly."""


class ClientGone(Exception):
    """The client closed its connection."""


@dataclass(frozen=True, slots=True)
class GenerationCall:
    """A checked request, and the writer that renders its answer."""

    request: GenerationRequest
    writer: AnswerWriter
    client: str
    """The tenant: the name of the client's API key, or the digest of a key without a name."""
    admit_until: float
    """Deadline (event loop's time) by which Redis must have accepted the request."""
    resume_from: int | None = None
    """Number of the first event to send of an already enqueued request; None enqueues the request."""


class GenerationResponse(Response):
    """Enqueues a request and answers with its events, as a stream or as one body.

    If an error occurs before the first byte was sent, it is raised, and the exception handlers turn it into
    an HTTP status. A later error is sent as the stream's last event. If the response ends before the request
    has ended, the request is aborted, unless it is detached.
    """

    def __init__(self, relay: Relay, settings: ApiSettings, call: GenerationCall) -> None:
        super().__init__()
        self._relay = relay
        self._settings = settings
        self._call = call
        self._writer = call.writer
        self._log: ExchangeLog
        self._is_started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._log = exchange_of(scope)
        self._log.note_request(self._call.request)
        request_id = self._call.request.request_id
        with self._relay.open_inbox(request_id) as inbox:
            watcher = asyncio.create_task(_watch(receive, inbox), name=f"watch {request_id}")
            try:
                await self._run(inbox, send)
            except ClientGone:
                self._log.note_client_gone(CLIENT_CLOSED_REQUEST)
            except asyncio.CancelledError:
                # uvicorn cancels this task after --timeout-graceful-shutdown, without waiting for its end.
                await self._end_with(ServerDraining(), send)
            except LorelayError as error:
                await self._end_with(error, send)
            except Exception as error:
                if not self._is_started:
                    raise
                log_unexpected(logger, error)
                await self._end_with(LorelayError(), send)
            finally:
                watcher.cancel()

    async def _run(self, inbox: Inbox, send: Send) -> None:
        source = EventSource(self._relay.queue, inbox, self._call.request, self._settings)
        with self._abort_at_exit(source):
            if self._call.resume_from is None:
                await source.enqueue(self._call.client, self._call.admit_until)
                # With their prompts, 1,000 open streams could take gigabytes of memory.
                self._call = replace(self._call, request=self._call.request.without_prompt())
            else:
                await source.resume(self._call.resume_from)
            try:
                async with asyncio.timeout(self._relay.queue.exchange_limit_s):
                    await self._forward(source, send)
            except TimeoutError:
                raise GenerationTimeout from None
            except InvalidRequest:
                if not self._call.request.detached:
                    await self._relay.queue.forget(self._call.request.request_id)
                raise

    @contextlib.contextmanager
    def _abort_at_exit(self, source: EventSource) -> Iterator[None]:
        """Aborts the request at the end of the context, unless it has ended or is detached."""
        try:
            yield
        finally:
            if not source.has_ended and not self._call.request.detached:
                self._relay.abort_soon(self._call.request.request_id)

    async def _forward(self, source: EventSource, send: Send) -> None:
        """Sends the events, as the writer renders them, up to the last event.

        Raises:
            LorelayError: an event reports an error; all earlier events were sent.
        """
        loop, is_stream = asyncio.get_running_loop(), self._writer.is_stream
        silence_s = self._settings.first_event_wait_s if is_stream else math.inf
        while not source.has_ended:
            events = await source.next(loop.time() + silence_s)
            silence_s = KEEP_ALIVE_S if is_stream else math.inf
            if not events:
                await self._send(PAUSED_COMMENT if self._log.has_events else QUEUED_COMMENT, send)
                continue
            self._log.note_events(events)
            pieces: list[bytes] = []
            for event in events:
                error = error_of(event)
                if error is not None:
                    if pieces:
                        await self._send(b"".join(pieces), send)
                    raise error
                pieces.append(self._writer.render(event))
            await self._send(b"".join(pieces), send, is_last=source.has_ended)

    async def _send(self, piece: bytes, send: Send, *, is_last: bool = False) -> None:
        if not self._is_started:
            is_stream = self._writer.is_stream
            if not (is_stream or is_last):
                return
            await self._start(send, None if is_stream else len(piece))
            piece = render_resumption(self._call.request.request_id, self._call.resume_from or 0) + piece
        if piece or is_last:
            await send({"type": "http.response.body", "body": piece, "more_body": not is_last})

    async def _start(self, send: Send, num_bytes: int | None) -> None:
        """Sends the response headers: of a stream if `num_bytes` is None, else of a body of `num_bytes`."""
        headers = [(b"x-lorelay-request-id", self._call.request.request_id.encode())]
        if num_bytes is None:
            headers += [
                (b"content-type", b"text/event-stream"),
                (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no"),
            ]
        else:
            headers += [(b"content-type", b"application/json"), (b"content-length", b"%d" % num_bytes)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        self._is_started = True

    async def _end_with(self, error: LorelayError, send: Send) -> None:
        """Reports an error to the client: as HTTP status before the first byte, later as the last event."""
        if not self._is_started:
            raise error
        self._log.note_error(error, mapped(error).status)
        body = render_data(render_error(error)) + DONE
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_S):
                await send({"type": "http.response.body", "body": body})


async def _watch(receive: Receive, inbox: Inbox) -> None:
    """Fails the inbox with `ClientGone` when the client disconnects."""
    while (await receive())["type"] != "http.disconnect":
        pass
    inbox.fail(ClientGone())
