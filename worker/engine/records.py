"""Types that the engine takes and returns, without anything of Redis or RQ."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from shared.errors import LorelayError
from shared.messages import StreamEvent

Prompts = list[list[int]] | LorelayError
"""The token ids of each prompt of a request, or the error that encoding them raised."""


class Output(NamedTuple):
    """One event of one request."""

    request_id: str
    event: StreamEvent
    meta: Mapping[str, Any] | None = None
    """Usage, timings and adapter, for dashboards, without prompt or answer; only with a terminal event."""
