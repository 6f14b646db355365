"""Server-sent events: the lines of a stream, as all of OpenAI's streaming answers use them."""

DONE = b"data: [DONE]\n\n"

# Comments end with one line break only: several clients take every blank line for the end of an event.
QUEUED_COMMENT = b": queued\n"
PAUSED_COMMENT = b": paused\n"

_LINE_SEPARATORS = tuple((char.encode(), b"\\u%04x" % ord(char)) for char in "\u0085\u2028\u2029")
"""Characters that end a line for `str.splitlines`, and their JSON escapes; the encoder escapes the others."""


def render_data(encoded: bytes) -> bytes:
    """A server-sent event of this JSON."""
    return b"data: %b\n\n" % on_one_line(encoded)


def render_id(request_id: str, event_no: int) -> bytes:
    """The `id:` line of an event; it goes in front of the event's data."""
    return b"id: %b:%d\n" % (request_id.encode(), event_no)


def render_resumption(request_id: str, first_event_no: int) -> bytes:
    """The first line of a stream that resumes at `first_event_no`: the id of the event before it.

    Clients keep this id for events that carry none. Without it, a client whose resumed stream ends with an
    error at once would come back without an id and get all events again.
    """
    return render_id(request_id, first_event_no - 1) if first_event_no else b""


def on_one_line(encoded: bytes) -> bytes:
    """JSON without line breaks, also for clients that split decoded text with `str.splitlines`, as httpx."""
    if encoded.isascii():
        return encoded
    for separator, escape in _LINE_SEPARATORS:
        encoded = encoded.replace(separator, escape)
    return encoded
