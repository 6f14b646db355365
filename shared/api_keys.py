"""API keys and their names, as `LORELAY_API_KEYS` and the file of keys define them.

A key's name identifies the client (the tenant): in requests, in the shares of the queues, in cached prefixes
and in log lines. Two keys may have the same name, so that a client can change its key without losing
anything.
"""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

MAX_FILE_BYTES = 16 * 1024 * 1024
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,62}")
"""Names are shorter than the digest that stands for a bare key, so that no name equals a digest."""
_SEPARATORS = re.compile(r"[ \t\r\n,]+")


class ApiKey(NamedTuple):
    """An API key and the client to which it belongs."""

    tenant: str
    """The key's name; the digest of a key without a name."""
    secret: str

    @property
    def digest(self) -> str:
        """The SHA-256 (hex) of the secret: the id that the previous release stored with each request."""
        return digest(self.secret)

    def __repr__(self) -> str:
        """Shows no secret, since a repr may end up in a log."""
        return f"ApiKey({shown(self.tenant)!r})"


class Client(NamedTuple):
    """The sender of a request."""

    tenant: str
    """The name of the sender's key; the digest of a key without a name; empty if requests need no key."""
    ids: frozenset[str]
    """The ids that its requests may have in Redis: `tenant`, and the digests that older releases stored."""


NOBODY = Client("", frozenset({""}))
"""The sender of all requests, if requests need no key."""


def digest(secret: str) -> str:
    """Returns the SHA-256 (hex) of a key, which identifies the key without showing it."""
    # The previous release decoded headers as Latin-1, then hashed the key; its digests stay valid.
    return hashlib.sha256(secret.encode().decode("latin-1").encode()).hexdigest()


def shown(tenant: str) -> str:
    """Returns a tenant as log lines show it: a name unchanged, a digest shortened to 12 digits."""
    return tenant[:12] if len(tenant) == hashlib.sha256().digest_size * 2 else tenant


def split_keys(text: str) -> tuple[str, ...]:
    """Returns the entries of a text, which are separated by spaces, commas or line breaks.

    Raises:
        ValueError: the text has only separators.
    """
    entries = tuple(entry for entry in _SEPARATORS.split(text) if entry)
    if text and not entries:
        raise ValueError("holds no key; leave it empty if requests need none")
    return entries


def parse_keys(entries: Iterable[str]) -> tuple[ApiKey, ...]:
    """Parses entries of the form `name:key` or `key`. If an entry occurs twice, it counts once.

    Raises:
        ValueError: a name or key is empty or has a forbidden character, or a key has two names. The message
            gives the number of the entry, from 1, and never shows a key.
    """
    keys: dict[str, ApiKey] = {}
    for number, entry in enumerate(entries, 1):
        key = _parse(entry, f"entry {number}")
        former = keys.setdefault(key.secret, key)
        if former.tenant != key.tenant:
            raise ValueError(f"entry {number} has the key of another entry, but not its name")
    return tuple(keys.values())


def read_keys_file(path: Path) -> bytes:
    """Returns the content of a file of keys.

    Raises:
        ValueError: the file can't be read, or is too large.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ValueError(f"can't be read: {error.strerror}") from error
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"is larger than {MAX_FILE_BYTES} bytes")
    return content


def entries_of_file(content: bytes) -> tuple[str, ...]:
    """Returns the entries in a file of keys; lines that begin with `#` are comments.

    Raises:
        ValueError: the content is not UTF-8, or has no entry.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError("is not UTF-8") from error
    lines = [line for line in text.split("\n") if not line.lstrip().startswith("#")]
    entries = tuple(entry for entry in _SEPARATORS.split("\n".join(lines)) if entry)
    if not entries:
        raise ValueError("holds no key")
    return entries


def _parse(entry: str, where: str) -> ApiKey:
    name, colon, secret = entry.partition(":")
    if not colon:
        name, secret = "", entry
    elif not NAME.fullmatch(name):
        raise ValueError(
            f"{where} has no valid name before its colon: 1 to 63 letters, digits, '.', '_', '@' or '-'"
        )
    if not secret:
        raise ValueError(f"{where} has no key after its colon")
    if not secret.isprintable() or any(map(str.isspace, secret)):
        raise ValueError(f"{where} has a key with a space or a character that can't be printed")
    return ApiKey(name if colon else digest(secret), secret)
