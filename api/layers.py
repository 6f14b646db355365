"""Layers around the whole application. The layers see every response, even one that a library writes."""

from collections.abc import Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.exchange_log import REQUEST_ID, exchange_of

EXPOSED_HEADERS = ("x-request-id", "x-lorelay-request-id", "x-should-retry", "retry-after")
"""Response headers that scripts of other origins may read, beyond those that every script may read."""
CONTENT_TYPE = b"content-type"
CHARSET = b"; charset=utf-8"
TEXT_TYPES = (b"application/json", b"application/javascript", b"application/xml")
TEXT_SUFFIXES = (b"+json", b"+xml")


def name_charset(app: ASGIApp) -> ASGIApp:
    """Returns `app` with `charset=utf-8` in the content type of every response that is text.

    Without a charset, clients such as `requests` decode `text/event-stream` as Latin-1.
    """

    async def layer(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_labelled(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [(name, labelled(name, value)) for name, value in message.get("headers", ())]
                message = {**message, "headers": headers}
            await send(message)

        await app(scope, receive, send_labelled if scope["type"] == "http" else send)

    return layer


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


def log_exchange(app: ASGIApp) -> ASGIApp:
    """Returns `app` with the header `x-request-id` in every response, and a log line for every exchange."""

    async def layer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        log = exchange_of(scope)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                log.note_status(message["status"])
                headers = [*message.get("headers", ()), (REQUEST_ID, log.request_id.encode())]
                message = {**message, "headers": headers}
            await send(message)

        try:
            await app(scope, receive, send_with_id)
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
