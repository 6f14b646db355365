"""Reads a request body up to a size limit."""

from contextlib import aclosing

from starlette.requests import Request

from shared.errors import RequestTooLarge


async def read_body(request: Request, max_num_bytes: int) -> bytes:
    """Returns the whole body of a request.

    Raises:
        RequestTooLarge: the body is longer than `max_num_bytes`; its rest is not read.
        ClientDisconnect: the client disconnected before it had sent the whole body.
    """
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


def _too_large(max_num_bytes: int) -> RequestTooLarge:
    return RequestTooLarge(f"The request body is larger than {max_num_bytes} bytes.")
