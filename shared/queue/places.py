"""The place of a waiting request: the text by which Redis sorts the requests of one queue.

A place is `class|version|tenant|priority|since|sequences|id`, each part of a fixed width, so that the order
of the texts is the order of the requests. The requests of one class, version and tenant form a line; the
order rule (`order.py`) chooses among lines, and inside a line the lower priority goes first, then the older
request. `lua/waiting.lua` writes the same format.
"""

import hashlib
from typing import NamedTuple

from shared.messages import GenerationRequest, RequestClass

BEGAN, INTERACTIVE, BATCH = 0, 1, 2
"""Classes, in the order in which they run. `BEGAN`: the request ran before and lost its worker."""
NOBODY = "0" * 8
"""The tenant of requests that were sent without an API key."""
NO_VERSION = "0" * 8
LINE_CHARS = 20
_CLASSES = {RequestClass.INTERACTIVE: INTERACTIVE, RequestClass.BATCH: BATCH}
_MIDDLE_PRIORITY = 2**31


class Place(NamedTuple):
    """A parsed place."""

    line: str
    """Class, version and tenant, with their separators: the common beginning of all places of the line."""
    since_ms: float
    """Time of the enqueue, by the clock of Redis."""
    num_sequences: int

    @property
    def request_class(self) -> int:
        """`BEGAN`, `INTERACTIVE` or `BATCH`."""
        return int(self.line[0])

    @property
    def tenant(self) -> str:
        """The `tenant_key` of the sender."""
        return self.line[11:19]


def read_place(text: str) -> Place:
    """Parses a place from the index; the scripts return no malformed ones."""
    since_us, num_sequences = text[31:47], text[48:54]
    return Place(text[:LINE_CHARS], int(since_us) / 1000, int(num_sequences))


def place_of(request: GenerationRequest) -> Place:
    """The place of a request without version and time, enough to charge its tenant and class."""
    line = f"{_CLASSES[request.request_class]}|{NO_VERSION}|{tenant_key(request.tenant)}|"
    return Place(line, 0.0, request.num_sequences)


def order_field(request: GenerationRequest) -> str:
    """The request's part of its place, `class|tenant|priority|sequences`; Redis adds version, time and id."""
    request_class = _CLASSES[request.request_class]
    priority = request.priority + _MIDDLE_PRIORITY
    return f"{request_class}|{tenant_key(request.tenant)}|{priority:010d}|{request.num_sequences:06d}"


def tenant_key(tenant: str) -> str:
    """Eight hex digits that stand for a tenant in places and shares."""
    return hashlib.sha256(tenant.encode()).hexdigest()[:8] if tenant else NOBODY
