"""Checks the API keys of requests."""

from starlette.requests import Request

from api.exchange_log import exchange_of
from api.keyring import Keyring
from shared.api_keys import NOBODY, Client
from shared.errors import InvalidApiKey


class ApiKeyCheck:
    """A FastAPI dependency of the `/v1` routes, which checks the bearer token if API keys are configured."""

    def __init__(self, keyring: Keyring) -> None:
        self._keyring = keyring

    def client_of(self, request: Request) -> Client:
        """Returns the client that sent a checked request; `NOBODY` if no key is required."""
        client = request.state.client
        assert isinstance(client, Client)
        return client

    async def __call__(self, request: Request) -> None:
        """Checks the API key of one request, and records the client for `client_of`.

        Raises:
            InvalidApiKey: the request has no key, or an unknown key.
        """
        # The client is found here once. If the file of keys changed in the middle of a request, a second
        # search could fail.
        client = NOBODY if self._keyring.is_empty else self._find(_bearer(request))
        exchange_of(request.scope).note_tenant(client.tenant)
        request.state.client = client

    def _find(self, given: str) -> Client:
        if not given:
            raise InvalidApiKey("You didn't provide an API key: send 'Authorization: Bearer YOUR_KEY'.")
        if (client := self._keyring.find(given.encode("latin-1"))) is None:
            raise InvalidApiKey
        return client


def _bearer(request: Request) -> str:
    """Returns the bearer token in a request's headers, or an empty string."""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    return given.strip() if scheme.lower() == "bearer" else ""
