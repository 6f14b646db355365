"""The records that a worker and `shared.queue.worker_streams` hand each other. No Redis, no RQ."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from shared.messages import GenerationRequest, StreamEvent


class Held(NamedTuple):
    """A request that a worker believes it owns, under the execution of its claim."""

    request_id: str
    execution_id: str


class Claim(NamedTuple):
    """A request handed to a worker: what to run, and what its log holds already."""

    held: Held
    request: GenerationRequest
    events: tuple[StreamEvent, ...]
    alone: bool = False
    """It was near crashes: its steps must run without company until it is cleared."""


class Append(NamedTuple):
    """One event for one request's log."""

    held: Held
    event: StreamEvent
    meta: Mapping[str, Any] | None = None
    """With the terminal event: what `job.meta` shows (usage, timings, adapter; never text)."""


class News(NamedTuple):
    """What the scripts tell a worker about the requests it named."""

    aborted: list[str]
    lost: list[str]
    in_time: bool = True
    """Of `renew`: whether the worker's own lease had held until then."""
    num_waiting: int = 0
    """Of `append`: how many of the base's queues wait; with 0 there is nothing to claim."""
    is_known: bool = True
    """Of `renew`: whether Redis still knows what the worker serves."""


class Reaped(NamedTuple):
    """Requests whose worker was lost: back on their queues, or dead-lettered."""

    requeued: list[str]
    dead: list[str]
