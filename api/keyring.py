"""The API keys that an API process accepts now; a file of keys is read again while the process runs."""

import asyncio
import hmac
import logging
from pathlib import Path

from shared.api_keys import ApiKey, Client, entries_of_file, parse_keys, read_keys_file, shown
from shared.errors import ConfigurationError
from shared.logs import fields, log_unexpected
from shared.settings import ApiSettings

logger = logging.getLogger(__name__)

REREAD_S = 1.0
"""Pause between two reads of the file of keys. A change counts once two reads in a row find it."""


class Keyring:
    """The accepted keys: keys in the settings, and keys in the file that the settings name."""

    def __init__(self, settings: ApiSettings) -> None:
        """Reads the file of keys, if the settings name one.

        Raises:
            ConfigurationError: the file can't be read, or is malformed.
        """
        self._entries = settings.api_keys
        self._file: Path | None = settings.api_keys_file
        self._content = b""
        self._last_error = ""
        try:
            if self._file is not None:
                self._content = read_keys_file(self._file)
            self._accepted = _by_secret(self._parse(self._content))
        except ValueError as error:
            raise ConfigurationError(f"LORELAY_API_KEYS_FILE: {self._file}: {error}") from None
        self._last_seen = self._content

    @property
    def is_empty(self) -> bool:
        """True if requests need no key."""
        return not self._accepted

    def find(self, given: bytes) -> Client | None:
        """Returns the client whose key was given; None if the key is unknown."""
        # If the comparison ended at the first difference, its duration would tell how much of a key is right.
        # Each key is therefore compared in constant time, and no key is skipped.
        equal = [client for secret, client in self._accepted if hmac.compare_digest(given, secret)]
        return equal[0] if equal else None

    async def watch(self) -> None:
        """Rereads the key file every `REREAD_S` until it is cancelled; if no file is set, returns at once."""
        while self._file is not None:
            await asyncio.sleep(REREAD_S)
            try:
                await asyncio.to_thread(self.reread)
            except Exception as error:
                # If an unforeseen exception ended this task, a key that is removed later would stay valid.
                log_unexpected(logger, error)

    def reread(self) -> None:
        """Reads the file once; accepts new keys only if the previous call read the same content.

        A file that is only half written thus has no effect. If the file is malformed or missing, the keys
        stay as they are, and an error is logged. May be called in any thread.
        """
        assert self._file is not None
        try:
            content = read_keys_file(self._file)
            is_settled, self._last_seen = content == self._last_seen, content
            if not is_settled or (content == self._content and not self._last_error):
                return
            keys = self._parse(content)
        except ValueError as error:
            self._complain(str(error))
            return
        self._content, self._accepted, self._last_error = content, _by_secret(keys), ""
        names = ", ".join(dict.fromkeys(shown(key.tenant) for key in keys))
        logger.info("%d API keys are accepted from now on: %s", len(keys), names, extra=fields("api_keys"))

    def _parse(self, content: bytes) -> tuple[ApiKey, ...]:
        of_file = () if self._file is None else entries_of_file(content)
        return parse_keys((*of_file, *self._entries))

    def _complain(self, reason: str) -> None:
        if reason != self._last_error:
            self._last_error = reason
            logger.error(
                "LORELAY_API_KEYS_FILE: %s: %s; the API keys read before stay valid",
                self._file,
                reason,
                extra=fields("api_keys"),
            )


def _by_secret(keys: tuple[ApiKey, ...]) -> tuple[tuple[bytes, Client], ...]:
    """Returns the secret of each key with its client."""
    ids: dict[str, set[str]] = {}
    for key in keys:
        ids.setdefault(key.tenant, {key.tenant}).add(key.digest)
    clients = {tenant: Client(tenant, frozenset(of_tenant)) for tenant, of_tenant in ids.items()}
    return tuple((key.secret.encode(), clients[key.tenant]) for key in keys)
