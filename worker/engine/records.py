"""What goes into the engine with a request, and what comes out of it. No Redis, no RQ."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from shared.errors import LorelayError
from shared.messages import StreamEvent

Prompts = list[list[int]] | LorelayError
"""The token ids of each prompt of a request, or why there are none."""


class Output(NamedTuple):
    """One event of one request."""

    request_id: str
    event: StreamEvent
    meta: Mapping[str, Any] | None = None
    """With the terminal event: what dashboards show of the request (usage, timings, adapter; never text)."""
