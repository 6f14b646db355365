"""Decodes the JSON of a request body, and refuses a body that has too many values."""

from collections.abc import Callable
from typing import Any

from pydantic_core import from_json

from api.contract.steps import Steps
from shared.errors import InvalidRequest

MAX_NUM_VALUES = 50_000
"""Maximum number of values (array items, fields of objects) in a body; reading one takes microseconds."""
BEGINNING_BYTES = 16 * 1024
LONG_BODY_BYTES = 64 * 1024
"""Size of a body above which a single step of reading it may take more than a few milliseconds."""
_PIECE_BYTES = 64 * 1024


def is_long(body: bytes) -> bool:
    """True if reading the body may take long; `StepRunner` reads only one such body at a time."""
    return len(body) > LONG_BODY_BYTES


def decoded(body: bytes, refuse_beginning: Callable[[dict[str, Any]], None]) -> Steps[dict[str, Any]]:
    """Decodes a body as a JSON object.

    If the body has too many values, `refuse_beginning` gets the values in the body's first bytes, and may
    raise a more precise error.

    Raises:
        InvalidRequest: the body is not valid JSON, is no object, or has more than `MAX_NUM_VALUES` values.
    """
    if (yield from _has_too_many_values(body)):
        refuse_beginning(_decode_beginning(body))
        raise InvalidRequest(
            f"The request body has more than {MAX_NUM_VALUES} values: shorten the conversation, or join its "
            "messages and parts."
        )
    return _decode(body)


def _decode_beginning(body: bytes) -> dict[str, Any]:
    """Returns the complete values in the first bytes of a body; none if they are not valid JSON."""
    try:
        value = from_json(body[:BEGINNING_BYTES], allow_inf_nan=False, allow_partial=True)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _decode(body: bytes) -> dict[str, Any]:
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest(f"The request body is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise InvalidRequest("The request body must be a JSON object.")
    return value


def _has_too_many_values(body: bytes) -> Steps[bool]:
    """Returns True if a body has more values than allowed; counts them without decoding the body.

    Every value follows a comma or an opening bracket, so these characters are counted. The first count
    includes commas and brackets in strings. If it exceeds the limit, a second count leaves strings out.
    """
    if _num_separators(body) <= MAX_NUM_VALUES:
        return False
    num_found, is_in_text, rest = 0, False, b""
    for begin in range(0, len(body), _PIECE_BYTES):
        # Escaped backslashes are removed first: in \\" the quote ends the text, in \" it does not.
        piece = (rest + body[begin : begin + _PIECE_BYTES]).replace(b"\\\\", b"").replace(b'\\"', b"")
        rest = b"\\" if piece.endswith(b"\\") else b""
        parts = piece.split(b'"')
        num_found += _num_separators(b"".join(parts[is_in_text::2]))
        is_in_text ^= len(parts) % 2 == 0
        if num_found > MAX_NUM_VALUES:
            return True
        yield
    return False


def _num_separators(text: bytes) -> int:
    return text.count(b",") + text.count(b"[") + text.count(b"{")
