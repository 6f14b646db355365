"""Reads JSON request bodies, within limits on the size and time of each, and on the memory of all."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from email.message import Message
from functools import lru_cache

from starlette.requests import Request

from shared.errors import RequestTimeout, RequestTooLarge, ServerBusy, UnsupportedMediaType
from shared.settings import ApiSettings

JSON = "application/json"
CHARSETS = ("utf-8", "utf8", "us-ascii")
FREE_BYTES = 16 * 1024
"""Size up to which a body does not count, so that short requests get in whatever the others send."""


class _Arriving:
    """A request body that is being received; a part of it is in memory."""

    def __init__(self, until: float) -> None:
        self.body = bytearray()
        self.timeout = asyncio.timeout_at(until)
        self.was_evicted = False

    @property
    def num_counted(self) -> int:
        return max(0, len(self.body) - FREE_BYTES)


class BodyReader:
    """Reads the bodies of all requests of an API process.

    If all bodies together take too much memory, the reader drops the body that has been arriving longest.
    Otherwise, clients that send bodies slowly, or never to the end, would keep other clients out.
    """

    def __init__(self, settings: ApiSettings) -> None:
        self._settings = settings
        self._num_bytes = 0
        self._arriving: dict[_Arriving, None] = {}
        """The bodies that are not complete yet, oldest first."""

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """Yields the whole body of a request, which counts as memory in use until the context ends.

        Raises:
            UnsupportedMediaType: the header `Content-Type` is missing, or is not JSON.
            RequestTooLarge: the body is larger than `max_body_bytes`; no more of it is read.
            RequestTimeout: the body did not arrive within `body_limit_s`.
            ServerBusy: all bodies together take too much memory.
            ClientDisconnect: the client disconnected before it had sent the whole body.
        """
        _check_declared_as_json(request)
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > self._settings.max_body_bytes:
            raise self._too_large()
        arriving = _Arriving(until=asyncio.get_running_loop().time() + self._settings.body_limit_s)
        self._arriving[arriving] = None
        try:
            await self._fill(arriving, request)
            self._arriving.pop(arriving)
            yield bytes(arriving.body)
        finally:
            self._arriving.pop(arriving, None)
            self._num_bytes -= arriving.num_counted

    async def _fill(self, arriving: _Arriving, request: Request) -> None:
        try:
            async with arriving.timeout, aclosing(request.stream()) as parts:
                async for part in parts:
                    self._add(arriving, part)
        except TimeoutError:
            raise (ServerBusy() if arriving.was_evicted else RequestTimeout()) from None

    def _add(self, arriving: _Arriving, part: bytes) -> None:
        before = arriving.num_counted
        arriving.body += part
        self._num_bytes += arriving.num_counted - before
        if len(arriving.body) > self._settings.max_body_bytes:
            raise self._too_large()
        if self._num_bytes > self._settings.max_arriving_bytes:
            self._evict_oldest(but=arriving)

    def _evict_oldest(self, *, but: _Arriving) -> None:
        """Drops the incomplete body that has been arriving longest, except `but`.

        Raises:
            ServerBusy: no other body is incomplete and takes memory.
        """
        for arriving in self._arriving:
            if arriving is not but and arriving.num_counted and not arriving.was_evicted:
                arriving.was_evicted = True
                arriving.timeout.reschedule(asyncio.get_running_loop().time())
                return
        raise ServerBusy

    def _too_large(self) -> RequestTooLarge:
        return RequestTooLarge(f"The request body is larger than {self._settings.max_body_bytes} bytes.")


def _check_declared_as_json(request: Request) -> None:
    """Refuses a body that is not declared as JSON.

    A browser sends bodies of other types to the API for any web page. Before a browser sends JSON to another
    origin, it asks the server for permission.

    Raises:
        UnsupportedMediaType: `Content-Type` is missing, or one of its values is not JSON in UTF-8.
    """
    values = request.headers.getlist("content-type")
    if not (values and all(map(_is_json, values))):
        given = f"not {', '.join(values)!r}" if values else "which the request lacks"
        raise UnsupportedMediaType(f"The body must be JSON with the header 'Content-Type: {JSON}', {given}.")


@lru_cache
def _is_json(content_type: str) -> bool:
    message = Message()
    message["Content-Type"] = content_type
    media_type, charset = content_type.partition(";")[0].strip().lower(), message.get_content_charset("utf-8")
    is_json = media_type == JSON or (media_type.startswith("application/") and media_type.endswith("+json"))
    return is_json and charset in CHARSETS
