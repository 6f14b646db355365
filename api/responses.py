"""The exchange of one chat completion: from the queue to the last byte that the client gets."""

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.contract.chat_answer import DONE, BodyWriter, ChunkWriter, Heading, render_data, render_resumption
from api.errors import mapped, render_error
from api.relay.event_source import EventSource, error_of
from api.relay.inbox import Inbox
from api.relay.relay import Relay
from shared.errors import GenerationTimeout, LorelayError, QueueFull, ServerDraining
from shared.logs import fields, log_unexpected
from shared.messages import GenerationRequest, StreamEvent
from shared.settings import ApiSettings

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 10.0
"""Silence on an open stream after which a comment line goes out."""
LAST_WORDS_S = 1.0
"""How long a client that reads slowly may hold up the error that ends its stream."""
CLIENT_CLOSED_REQUEST = 499
"""nginx's number, in our log only."""
# Without a blank line: several clients take every blank line for the end of an event.
QUEUED_COMMENT = b": queued\n"
PAUSED_COMMENT = b": paused\n"


class ClientGone(Exception):
    """The client closed its connection."""


@dataclass(frozen=True, slots=True)
class ChatCall:
    """A checked request, and the form its answer takes."""

    request: GenerationRequest
    stream: bool
    include_usage: bool
    client: str
    """Who sent it: a digest of the API key."""
    admit_until: float
    """The event loop's time by which Redis must have taken it."""
    resume_from: int | None = None
    """The first event to send of a request that was enqueued before; None enqueues it."""


class ChatCompletionResponse(Response):
    """Enqueues a request and answers with its events, as a stream or as one body.

    Raises what goes wrong as long as nothing was sent (the exception handlers make a status of it); later an
    error is the stream's last event. A request that has not ended when the exchange does is aborted.
    """

    def __init__(self, relay: Relay, settings: ApiSettings, call: ChatCall) -> None:
        super().__init__()
        self._relay = relay
        self._settings = settings
        self._call = call
        request = call.request
        self._heading = Heading(request.request_id, request.created, request.model)
        self._begun_at = time.monotonic()
        self._first_event_s: float | None = None
        self._is_started = False
        self._may_run = False
        self._outcome = "unknown"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = self._call.request.request_id
        with self._relay.open_inbox(request_id) as inbox:
            watcher = asyncio.create_task(_watch(receive, inbox), name=f"watch {request_id}")
            try:
                await self._run(inbox, send)
            except ClientGone:
                self._outcome = "client_gone"
                self.status_code = 200 if self._is_started else CLIENT_CLOSED_REQUEST
            except asyncio.CancelledError:
                # uvicorn's --timeout-graceful-shutdown is over; it goes on without waiting for us.
                await self._end_with(ServerDraining(), send)
            except LorelayError as error:
                await self._end_with(error, send)
            except Exception as error:
                if not self._is_started:
                    self._outcome, self.status_code = LorelayError.code, mapped(LorelayError()).status
                    raise
                log_unexpected(logger, error)
                await self._end_with(LorelayError(), send)
            finally:
                watcher.cancel()
                if self._may_run and not self._call.request.detached:
                    self._relay.abort_soon(request_id)
                self._log_end()

    async def _run(self, inbox: Inbox, send: Send) -> None:
        call = self._call
        self._may_run = True
        if call.resume_from is None:
            await self._enqueue()
        else:
            await self._relay.queue.attach(inbox.request_id)
            inbox.start_at(call.resume_from)
        source = EventSource(self._relay, inbox, call.request, self._settings.queue_time_limit_s)
        try:
            async with asyncio.timeout(self._relay.queue.exchange_limit_s):
                await (self._stream(source, send) if call.stream else self._answer(source, send))
        except TimeoutError:
            raise GenerationTimeout from None
        finally:
            self._may_run = not source.has_ended

    async def _enqueue(self) -> None:
        call = self._call
        try:
            await self._relay.queue.enqueue(call.request, call.client, call.admit_until)
        except (QueueFull, ServerDraining):
            self._may_run = False
            raise

    async def _stream(self, source: EventSource, send: Send) -> None:
        loop = asyncio.get_running_loop()
        writer = ChunkWriter(
            self._heading,
            include_usage=self._call.include_usage,
            with_ids=self._call.request.detached,
            begun=range(self._call.request.n) if self._call.resume_from else (),
        )
        silence_s = self._settings.first_event_wait_s
        while not source.has_ended:
            events = await source.next(loop.time() + silence_s)
            silence_s = KEEP_ALIVE_S
            if not events:
                await self._send_chunks(self._comment, send)
                continue
            self._note(events)
            rendered: list[bytes] = []
            for event in events:
                if (error := error_of(event)) is not None:
                    if rendered:
                        await self._send_chunks(b"".join(rendered), send)
                    raise error
                rendered.append(writer.render(event))
            await self._send_chunks(b"".join(rendered), send)
        await send({"type": "http.response.body", "body": b""})

    async def _answer(self, source: EventSource, send: Send) -> None:
        loop = asyncio.get_running_loop()
        writer = BodyWriter(self._heading, self._call.request.n)
        while not source.has_ended:
            events = await source.next(loop.time() + KEEP_ALIVE_S)
            self._note(events)
            for event in events:
                if (error := error_of(event)) is not None:
                    raise error
            writer.add(events)
            if source.has_ended:
                usage = events[-1].usage
                assert usage is not None
                await self._start(send, b"application/json", body := writer.render(usage))
                await send({"type": "http.response.body", "body": body})

    @property
    def _comment(self) -> bytes:
        return QUEUED_COMMENT if self._first_event_s is None else PAUSED_COMMENT

    async def _send_chunks(self, chunks: bytes, send: Send) -> None:
        if not self._is_started:
            await self._start(send, b"text/event-stream")
            chunks = render_resumption(self._call.request.request_id, self._call.resume_from or 0) + chunks
        if chunks:
            await send({"type": "http.response.body", "body": chunks, "more_body": True})

    async def _start(self, send: Send, media_type: bytes, body: bytes | None = None) -> None:
        headers = [
            (b"content-type", media_type),
            (b"x-request-id", self._call.request.request_id.encode()),
        ]
        if body is not None:
            headers.append((b"content-length", str(len(body)).encode()))
        else:
            headers += [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        self._is_started = True

    async def _end_with(self, error: LorelayError, send: Send) -> None:
        """The client learns of an error, in the form that is still possible."""
        self._outcome = error.code
        if not self._is_started:
            self.status_code = mapped(error).status
            raise error
        body = render_data(render_error(error)) + DONE
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_S):
                await send({"type": "http.response.body", "body": body})

    def _note(self, events: list[StreamEvent]) -> None:
        if events and self._first_event_s is None:
            self._first_event_s = time.monotonic() - self._begun_at
        if events and events[-1].is_terminal:
            self._outcome = events[-1].finish_reason or "unknown"

    def _log_end(self) -> None:
        request, total_s = self._call.request, time.monotonic() - self._begun_at
        first_event_s = self._first_event_s
        logger.info(
            "chat completion %s by %s ended: %s, %d, %.3f s (first event: %s)",
            request.request_id,
            request.model,
            self._outcome,
            self.status_code,
            total_s,
            "none" if first_event_s is None else f"{first_event_s:.3f} s",
            extra=fields(
                "request_end",
                request_id=request.request_id,
                model=request.model,
                adapter_name=request.adapter_name,
                outcome=self._outcome,
                status=self.status_code,
                total_s=total_s,
                first_event_s=first_event_s,
            ),
        )


async def _watch(receive: Receive, inbox: Inbox) -> None:
    """Ends the inbox when the client leaves."""
    while (await receive())["type"] != "http.disconnect":
        pass
    inbox.fail(ClientGone())
