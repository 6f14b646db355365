"""Strings that record which of their characters a client wrote, and keep this record in operations."""

import operator
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Set, ValuesView
from typing import Any, Self, SupportsIndex

OWN, CLIENT = b"\0", b"\1"
"""The two values in a mask: a character of the chat template, and one that a client wrote."""

ROLES = ("developer", "system", "user", "assistant", "tool", "function")
"""The roles that a message can have; they do not count as text of the client."""


class MarkedText(str):
    """A string with a mask that has one byte per character: `OWN` or `CLIENT`.

    The methods defined here keep the mask exact. The result of any other method is a plain string, which
    `worker.model.marked_template` marks as the client's.
    """

    mask: bytes

    def __new__(cls, text: str, mask: bytes | None = None) -> Self:
        """Marks `text` with `mask`; without a mask, all of the text is the client's."""
        marked = super().__new__(cls, text)
        marked.mask = CLIENT * len(text) if mask is None else mask
        return marked

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> "MarkedText":
        return MarkedText(super().__add__(other), self.mask + mask_of(other))

    def __radd__(self, other: str) -> "MarkedText":
        return MarkedText(str.__add__(other, self), mask_of(other) + self.mask)

    def __mul__(self, count: SupportsIndex) -> "MarkedText":
        return MarkedText(super().__mul__(count), self.mask * count)

    __rmul__ = __mul__

    def __getitem__(self, key: SupportsIndex | slice) -> "MarkedText":
        if isinstance(key, slice):
            return MarkedText(super().__getitem__(key), self.mask[key])
        position = operator.index(key)
        return MarkedText(super().__getitem__(position), bytes([self.mask[position]]))

    def __iter__(self) -> Iterator["MarkedText"]:
        return (self[position] for position in range(len(self)))

    def strip(self, chars: str | None = None, /) -> "MarkedText":
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> "MarkedText":
        return self[len(self) - len(super().lstrip(chars)) :]

    def rstrip(self, chars: str | None = None, /) -> "MarkedText":
        return self[: len(super().rstrip(chars))]

    def removeprefix(self, prefix: str, /) -> "MarkedText":
        return self[len(prefix) :] if self.startswith(prefix) else self

    def removesuffix(self, suffix: str, /) -> "MarkedText":
        return self[: len(self) - len(suffix)] if suffix and self.endswith(suffix) else self

    def partition(self, sep: str, /) -> Any:
        return self._cut(super().partition(sep))

    def rpartition(self, sep: str, /) -> Any:
        return self._cut(super().rpartition(sep))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> Any:
        return self._find(super().split(sep, maxsplit), len(sep or ""))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> Any:
        return self._find(super().rsplit(sep, maxsplit), len(sep or ""))

    def splitlines(self, keepends: bool = False) -> Any:
        lines = list(self._cut(super().splitlines(keepends=True)))
        return lines if keepends else [line[: len(str.splitlines(line)[0])] for line in lines]

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> "MarkedText":
        left, pieces = operator.index(count), []
        if not old:  # `new` goes between all characters
            return MarkedText(super().replace(old, new, count))
        rest: MarkedText = self
        while left and (place := rest.find(old)) >= 0:
            pieces += [rest[:place], new]
            rest, left = rest[place + len(old) :], left - 1
        return join([*pieces, rest])

    def join(self, pieces: Iterable[str], /) -> "MarkedText":
        return join(pieces, self)

    def _same_length(self, changed: str) -> "MarkedText":
        return MarkedText(changed, self.mask if len(changed) == len(self) else None)

    def lower(self) -> "MarkedText":
        return self._same_length(super().lower())

    def upper(self) -> "MarkedText":
        return self._same_length(super().upper())

    def title(self) -> "MarkedText":
        return self._same_length(super().title())

    def capitalize(self) -> "MarkedText":
        return self._same_length(super().capitalize())

    def _cut(self, pieces: Iterable[str]) -> tuple["MarkedText", ...]:
        """Returns the pieces of this text, which follow each other without a gap, as marked texts."""
        found, position = [], 0
        for piece in pieces:
            found.append(self[position : position + len(piece)])
            position += len(piece)
        return tuple(found)

    def _find(self, pieces: Iterable[str], separator_length: int) -> list["MarkedText"]:
        """Returns pieces of this text as marked texts.

        Each separator has this length (0: any white space).
        """
        found: list[MarkedText] = []
        position = 0
        for piece in pieces:
            position = position if separator_length else self.find(piece, position)
            found.append(self[position : position + len(piece)])
            position += len(piece) + separator_length
        return found


def mask_of(text: str) -> bytes:
    """Returns the mask of a string; all characters of a plain string count as the template's."""
    return text.mask if isinstance(text, MarkedText) else OWN * len(text)


def join(pieces: Iterable[str], separator: str = "") -> MarkedText:
    """Joins strings, plain or marked."""
    pieces = [piece if isinstance(piece, str) else str(piece) for piece in pieces]
    masks = [mask_of(piece) for piece in pieces]
    return MarkedText(str.join(separator, pieces), mask_of(separator).join(masks))


def mark(value: Any) -> Any:
    """Returns a copy of JSON data in which all strings except messages' roles are marked as the client's.

    The keys of objects are marked, too.
    """
    if isinstance(value, str):
        return MarkedText(value)
    if isinstance(value, Mapping):
        return {mark(key): item if _is_role(key, item) else mark(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [mark(item) for item in value]
    return value


def _is_role(key: str, value: Any) -> bool:
    """True for the role of a message, which some templates turn into a control token."""
    return key == "role" and value in ROLES


def is_marked(value: Any) -> bool:
    """True if a value is, or contains, text that a client wrote."""
    if isinstance(value, MarkedText):
        return CLIENT in value.mask
    if isinstance(value, Mapping):
        return any(is_marked(key) or is_marked(item) for key, item in value.items())
    if isinstance(value, bytes):  # only encoded text can be bytes
        return True
    return isinstance(value, list | tuple | Set | ValuesView) and any(map(is_marked, value))


def keep_marks(operation: Callable[..., Any], template: str, *args: Any, **kwargs: Any) -> Any:
    """Formats `template` with arguments.

    Arguments keep their marks where the result contains them unchanged.
    """
    nonce = secrets.token_hex(8)
    texts: list[MarkedText] = []

    def stand_in(value: Any) -> Any:
        if isinstance(value, MarkedText):
            texts.append(value)
            return f"{nonce}{len(texts) - 1:08}"
        if isinstance(value, dict):
            return {stand_in(key): stand_in(item) for key, item in value.items()}
        return type(value)(map(stand_in, value)) if type(value) in (tuple, list) else value

    plain = operation(template, *args, **kwargs)
    stand_ins = stand_in(args), {name: stand_in(value) for name, value in kwargs.items()}
    if is_marked(stand_ins):
        return MarkedText(str(plain))
    with_stand_ins = operation(template, *stand_ins[0], **stand_ins[1])
    begin, *pieces = str(with_stand_ins).split(nonce)
    marked: list[str] = [begin]
    for piece in pieces:
        number, text = piece[:8], piece[8:]
        marked += [texts[int(number)] if number.isdigit() else number, text]
    joined = join(marked)
    # A format such as %.3s shortens or pads the stand-ins; then all of the result counts as the client's.
    return joined if joined == plain else MarkedText(str(plain))
