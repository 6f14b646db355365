"""The log line of one HTTP exchange (a request and its response): outcome, status and times."""

import logging
import time

from shared.api_keys import shown
from shared.logs import fields
from shared.messages import GenerationRequest, StreamEvent

logger = logging.getLogger(__name__)


class ExchangeLog:
    """Collects the outcome and the times of one HTTP exchange, and logs them once, at its end.

    Metrics that are counted here would differ between API processes: a monitoring system must collect them
    from every process, unlike numbers in Redis, which are the same for all processes.
    """

    def __init__(self, request: GenerationRequest) -> None:
        self._request = request
        self._begun_at = time.monotonic()
        self._first_event_s: float | None = None
        self._outcome = "unknown"
        self._status = 200

    @property
    def has_events(self) -> bool:
        """True once an event of the request has arrived."""
        return self._first_event_s is not None

    def note_events(self, events: list[StreamEvent]) -> None:
        """Records the time of the first event and the outcome that the last event reports."""
        if events and self._first_event_s is None:
            self._first_event_s = time.monotonic() - self._begun_at
        if events and events[-1].is_terminal:
            self._outcome = events[-1].finish_reason or "unknown"

    def note_failure(self, outcome: str, status: int) -> None:
        """Records a failure as the outcome: an error code, or `client_gone` if the client disconnected."""
        self._outcome, self._status = outcome, status

    def write(self) -> None:
        """Writes the log line."""
        request, total_s = self._request, time.monotonic() - self._begun_at
        first_event_s = self._first_event_s
        logger.info(
            "request %s to %s%s ended: %s, %d, %.3f s (first event: %s)",
            request.request_id,
            request.model,
            f" for {shown(request.tenant)}" if request.tenant else "",
            self._outcome,
            self._status,
            total_s,
            "none" if first_event_s is None else f"{first_event_s:.3f} s",
            extra=fields(
                "request_end",
                request_id=request.request_id,
                model=request.model,
                adapter_name=request.adapter_name,
                tenant=shown(request.tenant),
                outcome=self._outcome,
                status=self._status,
                total_s=total_s,
                first_event_s=first_event_s,
            ),
        )
