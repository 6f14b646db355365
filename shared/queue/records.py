"""Arguments and results of the scripts that workers call (`worker_streams`, `upkeep_streams`), as tuples."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from shared.messages import GenerationRequest, StreamEvent


class Held(NamedTuple):
    """A request that this worker claimed, and the id of the claim, which is a fencing token.

    If another worker has claimed the request since, scripts refuse this claim id. RQ's records contain the
    claim id as the id of the job's execution.
    """

    request_id: str
    claim_id: str


class Claim(NamedTuple):
    """A claimed request, with the events that earlier claims wrote to its log."""

    held: Held
    request: GenerationRequest
    events: tuple[StreamEvent, ...]
    alone: bool = False
    """True for a suspect (a request that may have crashed a worker): its steps must run alone for a while."""
    waited_s: float = 0
    """Seconds between the enqueue and this claim, by the clock of Redis."""
    claimed_at_s: float = 0
    """Time of the claim (`time.monotonic()`)."""


class Append(NamedTuple):
    """An event to be written to the log of a request."""

    held: Held
    event: StreamEvent
    meta: Mapping[str, Any] | None = None
    """For a terminal event: usage, timings and adapter, stored in `job.meta`; never text of the request."""


class News(NamedTuple):
    """The reply of `append` or `renew`, which tells a worker what has changed for it in Redis."""

    aborted: list[str]
    """Ids of requests that their clients aborted, or whose clients disconnected."""
    lost: list[str]
    """Ids of requests that this worker does not own any more."""
    had_lease: bool = True
    """True if the worker's own lease had not expired before this renewal (set by `renew`)."""
    num_waiting: int = 0
    """Number of the base's queues with waiting requests; 0: no request to claim (set by `append`)."""
    has_served: bool = True
    """True if the worker's `served` hash still exists in Redis (set by `renew`)."""


class Reaped(NamedTuple):
    """Ids of the requests whose leases expired: `requeued` are back on their queues, `dead` have failed."""

    requeued: list[str]
    dead: list[str]
