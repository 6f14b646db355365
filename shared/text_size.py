"""The size of the part of a text that every tokenizer must encode.

Byte-level vocabularies may lack the bytes of control characters and of Unicode planes without characters.
Tokenizers drop such bytes, so this size leaves them out.
"""

_CONTROLS = bytes({*range(0x20), 0x7F} - set(b"\t\n\r"))
_RARE_LEADS = bytes(range(0xF1, 0xF5))
"""First bytes of the characters from U+40000 on, which have four bytes each."""

ORDINARY_BYTES = frozenset({*b"\t\n\r", *range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC2, 0xF1)})
"""The bytes of which the counted characters consist."""


def num_ordinary_bytes(text: str) -> int:
    """Returns the number of bytes (UTF-8) of the characters in `text` that every tokenizer must encode."""
    encoded = text.encode(errors="replace")
    num_rare = len(encoded) - len(encoded.translate(None, _RARE_LEADS))
    return len(encoded.translate(None, _CONTROLS)) - 4 * num_rare
