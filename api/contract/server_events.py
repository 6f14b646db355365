"""Renders server-sent events, the format of OpenAI's streamed answers."""

DONE = b"data: [DONE]\n\n"

# If a blank line followed a comment, several clients would report an event without data.
QUEUED_COMMENT = b": queued\n"
PAUSED_COMMENT = b": paused\n"

_LINE_SEPARATORS = tuple((char.encode(), b"\\u%04x" % ord(char)) for char in "\u0085\u2028\u2029")
"""Characters at which `str.splitlines` splits and that msgspec does not escape, with their JSON escapes."""


def render_data(encoded: bytes) -> bytes:
    """Renders a server-sent event whose data is this JSON."""
    return b"data: %b\n\n" % on_one_line(encoded)


def render_id(request_id: str, event_no: int) -> bytes:
    """Renders the `id:` line of an event, which precedes the event's data."""
    return b"id: %b:%d\n" % (request_id.encode(), event_no)


def render_resumption(request_id: str, first_event_no: int) -> bytes:
    """Renders the first line of a stream that resumes at `first_event_no`: the id of the previous event.

    Clients remember the last id that they received. Without this line, a client whose resumed stream ends at
    once, with an error, would reconnect without an id and get all events again.
    """
    return render_id(request_id, first_event_no - 1) if first_event_no else b""


def on_one_line(encoded: bytes) -> bytes:
    """Escapes line separators in JSON, for clients such as httpx that split text with `str.splitlines`."""
    if encoded.isascii():
        return encoded
    for separator, escape in _LINE_SEPARATORS:
        encoded = encoded.replace(separator, escape)
    return encoded
