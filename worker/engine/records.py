"""Types that the engine takes and returns; they know nothing of Redis or RQ."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from shared.errors import LorelayError
from shared.messages import StreamEvent, ToolCallPart

Prompts = list[list[int]] | LorelayError
"""The token ids of each prompt of a request, or the error that encoding them raised."""


class AdapterCounts(NamedTuple):
    """The numbers of a worker's adapters in slots, in host memory and on disk, and their sizes in bytes."""

    num_adapters: int = 0
    num_resident: int = 0
    """Number of adapters in slots on the device."""
    num_resident_bytes: int = 0
    num_slots: int = 0
    num_cached: int = 0
    """Number of adapters in host memory; some of them are resident, too."""
    num_cached_bytes: int = 0
    num_on_disk: int = 0
    """Number of adapters that are neither in a slot nor in host memory."""
    num_reads: int = 0
    """Number of reads from disk since the worker serves."""


class Output(NamedTuple):
    """One event of one request."""

    request_id: str
    event: StreamEvent
    meta: Mapping[str, Any] | None = None
    """Usage, timings and adapter, for dashboards, without prompt or answer; only with a terminal event."""


class MessagePart(NamedTuple):
    """A part of the message that a model writes."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallPart, ...] = ()
