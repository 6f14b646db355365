"""Places: the sort keys of waiting requests, stored in one sorted set per queue.

A place is the text `class|version|tenant|priority|since|sequences|id`. All parts before the id have a fixed
width, so that sorting the texts sorts the requests. The requests of a queue with the same class, version and
tenant form a line. The order rule (`order.py`) chooses among lines. Inside a line, the request with the lower
priority number goes first, then the older request. `lua/waiting.lua` writes the same format.
"""

import hashlib
from typing import NamedTuple

from shared.messages import GenerationRequest, RequestClass

BEGAN, INTERACTIVE, BATCH = 0, 1, 2
"""Classes, in the order in which they run. `BEGAN` means that the request ran before and lost its worker."""
NOBODY = "0" * 8
"""The tenant key of requests that were sent without an API key."""
NO_VERSION = "0" * 8
LINE_CHARS = 20
_CLASSES = {RequestClass.INTERACTIVE: INTERACTIVE, RequestClass.BATCH: BATCH}
_MIDDLE_PRIORITY = 2**31


class Place(NamedTuple):
    """The parsed sort key of a waiting request."""

    line: str
    """Class, version and tenant with their separators: the prefix that all places of a line share."""
    since_ms: float
    """Time (ms) at which the request was enqueued, by the clock of Redis."""
    num_sequences: int

    @property
    def request_class(self) -> int:
        """The class: `BEGAN`, `INTERACTIVE` or `BATCH`."""
        return int(self.line[0])

    @property
    def tenant(self) -> str:
        """The `tenant_key` of the client that sent the request, a short hash."""
        return self.line[11:19]


def read_place(text: str) -> Place:
    """Parses a place without validating it, because scripts return only well-formed places."""
    since_us, num_sequences = text[31:47], text[48:54]
    return Place(text[:LINE_CHARS], int(since_us) / 1000, int(num_sequences))


def place_of(request: GenerationRequest) -> Place:
    """Returns a request's place without version and time, which `WaitingOrder.charge` does not need."""
    line = f"{_CLASSES[request.request_class]}|{NO_VERSION}|{tenant_key(request.tenant)}|"
    return Place(line, 0.0, request.num_sequences)


def order_field(request: GenerationRequest) -> str:
    """Returns `class|tenant|priority|sequences`, to which scripts add the request's version, time and id."""
    request_class = _CLASSES[request.request_class]
    priority = request.priority + _MIDDLE_PRIORITY
    return f"{request_class}|{tenant_key(request.tenant)}|{priority:010d}|{request.num_sequences:06d}"


def tenant_key(tenant: str) -> str:
    """Returns eight hex digits of a hash, which identify the tenant in places and shares."""
    return hashlib.sha256(tenant.encode()).hexdigest()[:8] if tenant else NOBODY
