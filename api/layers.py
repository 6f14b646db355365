"""Layers around the whole application. The layers see every response, even one that a library writes."""

from collections.abc import Awaitable, Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.exchange_log import REQUEST_ID, exchange_of

EXPOSED_HEADERS = ("x-request-id", "x-lorelay-request-id", "x-should-retry", "retry-after")
"""Response headers that scripts of other origins may read, beyond those that every script may read."""
CONTENT_TYPE = b"content-type"
CHARSET = b"; charset=utf-8"
TEXT_TYPES = (b"application/json", b"application/javascript", b"application/xml")
TEXT_SUFFIXES = (b"+json", b"+xml")


def allow_origins(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """Returns `app` with CORS headers for web pages of these origins; `app` itself if there are none.

    A browser's preflight request is answered here, before keys are checked: it never has an API key.
    """
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=("GET", "POST", "DELETE"),
        allow_headers=("*",),
        expose_headers=EXPOSED_HEADERS,
    )


def as_exchange(app: ASGIApp) -> ASGIApp:
    """Returns `app` with a log line for every exchange, and two changes of the headers of every response.

    Each response has `x-request-id`, and each text has `charset=utf-8`: without a charset, clients such as
    `requests` decode `text/event-stream` as Latin-1.
    """

    async def layer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        log = exchange_of(scope)

        # A coroutine here would cost CPU time for each piece of a stream.
        def send_labelled(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                log.note_status(message["status"])
                headers = [(name, labelled(name, value)) for name, value in message.get("headers", ())]
                message = {**message, "headers": [*headers, (REQUEST_ID, log.request_id.encode())]}
            return send(message)

        try:
            await app(scope, receive, send_labelled)
        finally:
            log.write()

    return layer


def labelled(name: bytes, value: bytes) -> bytes:
    """Returns the value of a header, with a charset if the header is the content type of a text."""
    if name.lower() != CONTENT_TYPE or b"charset=" in value.lower():
        return value
    media_type = value.partition(b";")[0].strip().lower()
    is_text = (
        media_type.startswith(b"text/") or media_type in TEXT_TYPES or media_type.endswith(TEXT_SUFFIXES)
    )
    return value + CHARSET if is_text else value
