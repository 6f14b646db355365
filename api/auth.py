"""API keys."""

import hashlib
import hmac
from collections.abc import Sequence

from starlette.requests import Request

from shared.errors import InvalidApiKey


class ApiKeyCheck:
    """Dependency of the `/v1` routes: asks for one of `keys` as Bearer; without keys, lets everybody in."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = tuple(key.encode() for key in keys)

    def client_of(self, request: Request) -> str:
        """The sender of a checked request: a digest of its key, or empty if no keys are asked for."""
        return hashlib.sha256(_bearer(request).encode()).hexdigest() if self._keys else ""

    async def __call__(self, request: Request) -> None:
        """Checks one request.

        Raises:
            InvalidApiKey: it has no key, or a wrong one.
        """
        if not self._keys:
            return
        if not (given := _bearer(request)):
            raise InvalidApiKey("You didn't provide an API key: send 'Authorization: Bearer YOUR_KEY'.")
        if not self._is_known(given):
            raise InvalidApiKey

    def _is_known(self, given: str) -> bool:
        # Compares all keys, in constant time; else the time taken would tell how much of a key is right.
        candidate = given.encode("latin-1")
        return sum(hmac.compare_digest(candidate, key) for key in self._keys) > 0


def _bearer(request: Request) -> str:
    """The key in a request's headers; empty without one."""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    return given.strip() if scheme.lower() == "bearer" else ""
