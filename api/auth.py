"""Checks the API keys of requests."""

import hashlib
import hmac
from collections.abc import Sequence

from starlette.requests import Request

from shared.errors import InvalidApiKey


class ApiKeyCheck:
    """FastAPI dependency of the `/v1` routes: if `keys` are set, requires one of them as a bearer token."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = tuple(key.encode() for key in keys)

    def client_of(self, request: Request) -> str:
        """Returns the client's id: the SHA-256 of a checked request's API key; "" if no key is required."""
        return hashlib.sha256(_bearer(request).encode()).hexdigest() if self._keys else ""

    async def __call__(self, request: Request) -> None:
        """Checks the API key of one request.

        Raises:
            InvalidApiKey: the request has no key, or an unknown key.
        """
        if not self._keys:
            return
        if not (given := _bearer(request)):
            raise InvalidApiKey("You didn't provide an API key: send 'Authorization: Bearer YOUR_KEY'.")
        if not self._is_known(given):
            raise InvalidApiKey

    def _is_known(self, given: str) -> bool:
        # If the comparison ended at the first difference, its duration would tell how much of a key is right.
        # Each key is therefore compared in constant time, and no key is skipped.
        candidate = given.encode("latin-1")
        return sum(hmac.compare_digest(candidate, key) for key in self._keys) > 0


def _bearer(request: Request) -> str:
    """Returns the bearer token in a request's headers, or an empty string."""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    return given.strip() if scheme.lower() == "bearer" else ""
