"""API keys."""

import hmac
from collections.abc import Sequence

from starlette.requests import Request

from shared.errors import InvalidApiKey


class ApiKeyCheck:
    """Dependency of the `/v1` routes: a Bearer key out of `keys`. Without any keys, everybody may enter."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = tuple(key.encode() for key in keys)

    async def __call__(self, request: Request) -> None:
        """Checks one request.

        Raises:
            InvalidApiKey: it has no key, or none of ours.
        """
        if not self._keys:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        given = given.strip()
        if scheme.lower() != "bearer" or not given:
            raise InvalidApiKey("You didn't provide an API key: send 'Authorization: Bearer YOUR_KEY'.")
        if not self._is_known(given):
            raise InvalidApiKey

    def _is_known(self, given: str) -> bool:
        # Constant time: every key is compared, and compare_digest does not stop at the first difference.
        candidate = given.encode("latin-1")
        return sum(hmac.compare_digest(candidate, key) for key in self._keys) > 0
