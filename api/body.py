"""Reads a request body that is declared as JSON, up to a size limit."""

from contextlib import aclosing
from email.message import Message

from starlette.requests import Request

from shared.errors import RequestTooLarge, UnsupportedMediaType

JSON = "application/json"
CHARSETS = ("utf-8", "utf8", "us-ascii")


async def read_body(request: Request, max_num_bytes: int) -> bytes:
    """Returns the whole body of a request that is declared as JSON.

    Raises:
        UnsupportedMediaType: the header `Content-Type` is missing or names something else.
        RequestTooLarge: the body is longer than `max_num_bytes`; its rest is not read.
        ClientDisconnect: the client disconnected before it had sent the whole body.
    """
    _check_declared_as_json(request)
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_num_bytes:
        raise _too_large(max_num_bytes)
    body = bytearray()
    async with aclosing(request.stream()) as parts:
        async for part in parts:
            body += part
            if len(body) > max_num_bytes:
                raise _too_large(max_num_bytes)
    return bytes(body)


def _check_declared_as_json(request: Request) -> None:
    """Refuses a body that is not declared as JSON.

    A browser sends such a body for any web page. Before it sends JSON to another origin, it asks the server.

    Raises:
        UnsupportedMediaType: `Content-Type` is missing, or one of its values is not JSON in UTF-8.
    """
    values = request.headers.getlist("content-type")
    if not (values and all(map(_is_json, values))):
        given = f"not {', '.join(values)!r}" if values else "which the request lacks"
        raise UnsupportedMediaType(f"The body must be JSON with the header 'Content-Type: {JSON}', {given}.")


def _is_json(content_type: str) -> bool:
    message = Message()
    message["Content-Type"] = content_type
    media_type, charset = content_type.partition(";")[0].strip().lower(), message.get_content_charset("utf-8")
    is_json = media_type == JSON or (media_type.startswith("application/") and media_type.endswith("+json"))
    return is_json and charset in CHARSETS


def _too_large(max_num_bytes: int) -> RequestTooLarge:
    return RequestTooLarge(f"The request body is larger than {max_num_bytes} bytes.")
