"""Probes of a running API."""

import contextlib
import http.client
import ssl


def is_http_ready(url: str) -> bool:
    """True if an API's `/ready` answers 200; the certificate is not checked."""
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
