"""The records that a worker and `shared.queue.worker_streams` hand each other. No Redis, no RQ."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from shared.messages import GenerationRequest, StreamEvent


class Held(NamedTuple):
    """A request that a worker believes it owns, and the id of its claim."""

    request_id: str
    claim_id: str


class Claim(NamedTuple):
    """A claimed request, with the events that its log holds already."""

    held: Held
    request: GenerationRequest
    events: tuple[StreamEvent, ...]
    alone: bool = False
    """True for a suspect: its steps must run alone until it is cleared."""


class Append(NamedTuple):
    """One event for one request's log."""

    held: Held
    event: StreamEvent
    meta: Mapping[str, Any] | None = None
    """Usage, timings and adapter for `job.meta`, with the terminal event; never text."""


class News(NamedTuple):
    """The reply of `append` or `renew`, about the requests that the worker holds."""

    aborted: list[str]
    lost: list[str]
    had_lease: bool = True
    """True if the worker's own lease had not run out (from `renew`)."""
    num_waiting: int = 0
    """The number of the base's queues that wait; with 0 there is nothing to claim (from `append`)."""
    has_served: bool = True
    """True if Redis still has the worker's `served` hash (from `renew`)."""


class Reaped(NamedTuple):
    """Requests whose worker was lost: those put back on their queues, and those that ended as failed."""

    requeued: list[str]
    dead: list[str]
