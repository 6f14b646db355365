"""The log line of one HTTP exchange (a request and its response): outcome, status and times."""

import json
import logging
import re
import time
import uuid
from functools import cached_property

from starlette.types import Scope

from shared.api_keys import shown
from shared.errors import LorelayError
from shared.logs import fields
from shared.messages import GenerationRequest, StreamEvent, Timings

logger = logging.getLogger(__name__)

REQUEST_ID = b"x-request-id"
MAX_ID_LENGTH = 128
"""Maximum length of an id from a client; longer ones are cut."""
MAX_SHOWN_LENGTH = 100
"""Maximum length of a path, a model's name and a parameter in the log line."""
SCOPE_KEY = "lorelay.exchange"
CLIENT_CLOSED_REQUEST = 499
"""The status that nginx logs for a client that disconnects before its response; used in log lines only."""
FAULT_STATUS = 500
QUIET_STATUS = 400
"""Exchanges outside `/v1` with a lower status, such as probes, are logged at the level DEBUG only."""


class ExchangeLog:
    """Collects the facts about one HTTP exchange, and logs them once, at its end.

    If metrics were counted here, each API process would have its own, and a monitoring system would have to
    collect them from every process. Numbers in Redis, in contrast, are the same for all processes.
    """

    def __init__(self, scope: Scope) -> None:
        self._method, self._path = str(scope.get("method", "")), str(scope.get("path", ""))
        self._client_id = _id_from_client(scope)
        self._begun_at = time.monotonic()
        self._request: GenerationRequest | None = None
        self._tenant = ""
        self._model: str | None = None
        self._code: str | None = None
        self._param: str | None = None
        self._reason = ""
        self._is_fault = False
        self._outcome = "ok"
        self._status = 0
        self._first_event_s: float | None = None
        self._timings: Timings | None = None

    @cached_property
    def _own_id(self) -> str:
        return f"req-{uuid.uuid4().hex}"

    @property
    def request_id(self) -> str:
        """The id for the header `x-request-id`: the client's, or the generation request's, or a new one."""
        return self._client_id or (self._request.request_id if self._request else self._own_id)

    @property
    def has_events(self) -> bool:
        """True once an event of the request has arrived."""
        return self._first_event_s is not None

    def note_tenant(self, tenant: str) -> None:
        """Records the name of the client whose API key was accepted; it is empty if no key is needed."""
        self._tenant = tenant

    def note_model(self, name: str | None) -> None:
        """Records the model that the client asked for, whether or not it exists."""
        self._model = name

    def note_request(self, request: GenerationRequest) -> None:
        """Records the generation request that this exchange sends to the queue, or resumes."""
        self._request, self._model, self._outcome = request.without_prompt(), request.model, "unknown"

    def note_status(self, status: int) -> None:
        """Records the status of the response whose headers are sent."""
        self._status = status

    def note_events(self, events: list[StreamEvent]) -> None:
        """Records the time of the first event and the outcome that the last event reports."""
        if events and self._first_event_s is None:
            self._first_event_s = time.monotonic() - self._begun_at
        if events and events[-1].is_terminal:
            self._outcome = events[-1].finish_reason or "unknown"
            self._timings = events[-1].timings

    def note_error(self, error: LorelayError, status: int) -> None:
        """Records the error that the client gets in place of the answer, or at the end of a stream.

        `status` is the status of the error; a stream that has begun was sent with 200 already.
        """
        cause = f": {error.__cause__!r}" if error.__cause__ else ""
        self.note_refusal(error.code, error.param, f"{error.message}{cause}", is_fault=status >= FAULT_STATUS)

    def note_refusal(self, code: str, param: str | None, reason: str, *, is_fault: bool = False) -> None:
        """Records code, parameter and message of an error; `is_fault` is False if the client caused it."""
        self._outcome = self._code = code
        self._param, self._reason, self._is_fault = param, reason, is_fault

    def note_client_gone(self, status: int) -> None:
        """Records that the client disconnected, and the status to log if no headers were sent before."""
        self._outcome, self._status = "client_gone", self._status or status

    def write(self) -> None:
        """Writes the log line.

        If the client did not cause the error, the line is a warning with the reason.
        """
        level = logging.WARNING if self._is_fault else logging.INFO
        if self._status < QUIET_STATUS and not self._path.startswith("/v1"):
            level = logging.DEBUG
        if not logger.isEnabledFor(level):
            return
        facts = self._facts()
        words = " ".join(f"{name}={_shown(value)}" for name, value in facts.items())
        total_s = time.monotonic() - self._begun_at
        logger.log(
            level,
            "%s ended: %s, %d, %.3f s %s%s",
            self._subject(),
            self._outcome,
            self._status,
            total_s,
            f"(first event: {_seconds(self._first_event_s)}) {words}" if self._request else words,
            f": {' '.join(self._reason.split())}" if self._is_fault else "",
            extra=fields(
                "request_end",
                **facts,
                request_id=self._request.request_id if self._request else None,
                adapter_name=self._request.adapter_name if self._request else None,
                tenant=shown(self._tenant),
                outcome=self._outcome,
                status=self._status,
                total_s=total_s,
                first_event_s=self._first_event_s,
            ),
        )

    def _subject(self) -> str:
        """Returns the first words of the line: the generation request, or else method and path."""
        sender = f" for {shown(self._tenant)}" if self._tenant else ""
        if self._request is None:
            return f"{_shown(self._method)} {_shown(self._path)}{sender}"
        return f"request {self._request.request_id} to {self._request.model}{sender}"

    def _facts(self) -> dict[str, str | float | None]:
        facts = {"id": self.request_id, "model": self._model, "code": self._code, "param": self._param}
        return facts | (self._times() if self._request else {})

    def _times(self) -> dict[str, str | float | None]:
        """Returns the worker's name, and how long each stage took; None for each value that is not known."""
        times = self._timings
        if times is None:
            return dict.fromkeys(("queue", "load", "encode", "prefill", "decode", "worker"))
        return {
            "queue": times.queue_s,
            "load": times.load_s,
            "encode": times.encode_s,
            "prefill": times.prefill_s,
            "decode": times.decode_s,
            "worker": times.worker or None,
        }


def exchange_of(scope: Scope) -> ExchangeLog:
    """Returns the log of the exchange with this ASGI scope; begins one if the scope has none."""
    log = scope.get(SCOPE_KEY)
    if not isinstance(log, ExchangeLog):
        log = scope[SCOPE_KEY] = ExchangeLog(scope)
    return log


def _id_from_client(scope: Scope) -> str:
    """Returns the client's `X-Request-Id`, shortened, with `_` for characters that could forge a log line."""
    given = dict(reversed(scope.get("headers", ()))).get(REQUEST_ID, b"")  # the first, if there are several
    cut = given.strip()[:MAX_ID_LENGTH].decode("latin-1")
    return re.sub(r"[^A-Za-z0-9._:/@+=-]", "_", cut)


def _shown(value: str | float | None) -> str:
    """Formats a value for the log line; a long text is shortened, and a text with spaces is quoted."""
    if value is None:
        return "-"
    if not isinstance(value, str):
        return f"{value:.3f}"
    cut = value if len(value) <= MAX_SHOWN_LENGTH else f"{value[:MAX_SHOWN_LENGTH]}…"
    return cut if re.fullmatch(r"[A-Za-z0-9._:/@+=\[\]…-]+", cut) else json.dumps(cut)


def _seconds(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f} s"
