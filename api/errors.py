"""Turns exceptions into HTTP status, headers and OpenAI's error envelope; no other module does this."""

import logging
from collections.abc import Mapping
from typing import NamedTuple

import msgspec
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from api.contract.server_events import on_one_line
from api.exchange_log import CLIENT_CLOSED_REQUEST, exchange_of
from shared import errors
from shared.errors import LorelayError
from shared.logs import log_unexpected

logger = logging.getLogger(__name__)

INVALID_REQUEST_TYPE = "invalid_request_error"
SERVER_TYPE = "server_error"


class Mapped(NamedTuple):
    """The HTTP status, error type and headers of one class of exception."""

    status: int
    type: str
    retry_after_s: int | None = None
    permanent: bool = False
    """True if a retry would fail or wait as long again; a header then tells clients not to retry."""
    headers: Mapping[str, str] = {}


def _refused(status: int, **headers: str) -> Mapped:
    return Mapped(status, INVALID_REQUEST_TYPE, permanent=True, headers=headers)


MAPPING: dict[type[LorelayError], Mapped] = {
    errors.LorelayError: Mapped(500, SERVER_TYPE),
    errors.InvalidRequest: _refused(400),
    errors.UnsupportedParameter: _refused(400),
    errors.ContextLengthExceeded: _refused(400),
    errors.InvalidApiKey: _refused(401, **{"WWW-Authenticate": "Bearer"}),
    errors.ModelNotFound: _refused(404),
    errors.NotServedYet: Mapped(503, SERVER_TYPE, retry_after_s=5),
    errors.RequestNotFound: _refused(404),
    errors.RequestTooLarge: _refused(413),
    errors.UnsupportedMediaType: _refused(415, Accept="application/json"),
    errors.HeadersTooLarge: _refused(431),
    errors.RequestTimeout: Mapped(408, INVALID_REQUEST_TYPE, retry_after_s=1),
    errors.ServerBusy: Mapped(503, SERVER_TYPE, retry_after_s=1),
    errors.QueueFull: Mapped(429, "rate_limit_error", retry_after_s=1),
    errors.QueueTimeout: Mapped(503, SERVER_TYPE, retry_after_s=5),
    # If the official clients retried, a request would wait several times as long as the setting says.
    errors.NoWorker: Mapped(503, SERVER_TYPE, retry_after_s=5, permanent=True),
    errors.QueueUnavailable: Mapped(503, SERVER_TYPE, retry_after_s=1),
    errors.QueueOutOfMemory: Mapped(503, SERVER_TYPE, retry_after_s=5),
    errors.AdapterError: Mapped(500, SERVER_TYPE, permanent=True),
    errors.AdapterVersionGone: Mapped(503, SERVER_TYPE, retry_after_s=1),
    errors.GenerationFailed: Mapped(500, SERVER_TYPE, permanent=True),
    errors.GenerationStopped: Mapped(500, SERVER_TYPE, permanent=True),
    errors.GenerationTimeout: Mapped(504, SERVER_TYPE, permanent=True),
    errors.ServerDraining: Mapped(503, SERVER_TYPE, retry_after_s=1),
    errors.ConfigurationError: Mapped(500, SERVER_TYPE, permanent=True),
    errors.RegistryConflict: _refused(409),
}


class ErrorBody(msgspec.Struct, frozen=True):
    """The fields of an error; all four are always present."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorEnvelope(msgspec.Struct, frozen=True):
    """The JSON body of an error response, in OpenAI's format."""

    error: ErrorBody


def mapped(error: LorelayError) -> Mapped:
    """Returns the entry of `MAPPING` for an exception's class, or else for its nearest base class."""
    return next(MAPPING[cls] for cls in type(error).__mro__ if cls in MAPPING)


def render_error(error: LorelayError) -> bytes:
    """Returns the error envelope of an exception, as JSON."""
    body = ErrorBody(error.message, mapped(error).type, error.param, error.code)
    return on_one_line(msgspec.json.encode(ErrorEnvelope(body)))


def error_response(error: LorelayError) -> Response:
    """Returns the HTTP response that reports an exception."""
    target = mapped(error)
    headers = dict(target.headers)
    if target.permanent:
        headers["x-should-retry"] = "false"
    measured_s = error.retry_after_s if isinstance(error, errors.QueueFull) else None
    if (retry_after_s := measured_s or target.retry_after_s) is not None:
        headers["Retry-After"] = str(retry_after_s)
    return Response(render_error(error), target.status, headers, "application/json")


def install(app: FastAPI) -> None:
    """Registers this module's handlers for all exceptions of an application."""
    app.add_exception_handler(LorelayError, _handle_ours)
    app.add_exception_handler(HTTPException, _handle_http)
    app.add_exception_handler(RequestValidationError, _handle_parameter)
    app.add_exception_handler(ClientDisconnect, _handle_disconnect)
    app.add_exception_handler(Exception, _handle_unexpected)


async def _handle_ours(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, LorelayError)
    return _report(request, exc)


async def _handle_http(request: Request, exc: Exception) -> Response:
    """Answers requests that the router refuses: an unknown path, or a method that a path does not have."""
    assert isinstance(exc, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(exc.status_code, INVALID_REQUEST_TYPE)
    message = f"{exc.detail}: {request.method} {request.url.path}"
    exchange_of(request.scope).note_refusal(code, None, message)
    envelope = ErrorEnvelope(ErrorBody(message, INVALID_REQUEST_TYPE, None, code))
    headers = {**(exc.headers or {}), "x-should-retry": "false"}
    return Response(on_one_line(msgspec.json.encode(envelope)), exc.status_code, headers, "application/json")


async def _handle_parameter(request: Request, exc: Exception) -> Response:
    """Answers a request in which FastAPI found an invalid URL parameter."""
    assert isinstance(exc, RequestValidationError)
    first = exc.errors()[0]
    name = str(first["loc"][-1])
    return _report(request, errors.InvalidRequest(f"Invalid value for '{name}': {first['msg']}.", param=name))


async def _handle_disconnect(request: Request, exc: Exception) -> Response:
    """Ends a request whose client disconnected while it sent the body; nobody receives this response."""
    exchange_of(request.scope).note_client_gone(CLIENT_CLOSED_REQUEST)
    return Response(status_code=400)


async def _handle_unexpected(request: Request, exc: Exception) -> Response:
    log_unexpected(logger, exc)
    return _report(request, LorelayError())


def _report(request: Request, error: LorelayError) -> Response:
    """Returns the response for an error, and records the error for the exchange's log line."""
    exchange_of(request.scope).note_error(error, mapped(error).status)
    return error_response(error)
