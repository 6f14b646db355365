"""Health probes of a running API."""

import contextlib
import http.client
import ssl


def is_http_ready(url: str) -> bool:
    """Returns True if `/ready` of the API at `url` answers 200; does not verify the API's TLS certificate."""
    scheme, _, address = url.partition("://")
    if scheme == "https":
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            address, timeout=2, context=ssl._create_unverified_context()
        )
    else:
        connection = http.client.HTTPConnection(address, timeout=2)
    with contextlib.closing(connection):
        try:
            connection.request("GET", "/ready")
            return connection.getresponse().status == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False
