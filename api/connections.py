"""Limits on the connections of an API process: their number, and the time and size of heads and bodies.

uvicorn itself limits only the number of connections, and would then refuse even `/health`. `Connection` in
`api/connection.py` extends uvicorn's protocol class; `ConnectionGuard` checks all connections once a second.
"""

import asyncio
import logging
import resource
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from api.connection import Connection
from api.errors import error_response
from api.layers import as_exchange
from shared.errors import ServerBusy
from shared.logs import fields
from shared.settings import ApiSettings

logger = logging.getLogger(__name__)

NUM_RESERVED = 32
"""Number of connections above the limit that are accepted for probes."""
NUM_OTHER_FILES = 128
"""Number of open files that are left for everything but connections."""
PROBES = ("/health", "/ready")
SWEEP_S = 1.0
LINGER_S = 2.0
"""Time for which a refused client may still send; if the socket closed at once, it could lose the answer."""
CLOSE_LIMIT_S = 5.0
"""Time without progress after which a connection that is to be closed is cut."""
LAST_WORDS_S = 2.0
"""Time after the drain in which responses can send their last event."""


class ConnectionGuard:
    """Limits the connections of one API process.

    If there are too many connections, the guard closes the one that has waited longest for its client to send
    a request. If no connection waits, the guard closes the one whose body has been arriving longest. If all
    connections have complete requests, a new connection can only use the probes (`/health`, `/ready`).
    """

    def __init__(self, settings: ApiSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._settings = settings
        self._max_num = settings.max_connections
        self._open: set[Any] = set()
        """All connections: `Connection`, or another protocol class of uvicorn."""
        self._waiting: OrderedDict[Connection, None] = OrderedDict()
        self._arriving: OrderedDict[Connection, None] = OrderedDict()
        self._was_full = False

    @property
    def connections(self) -> set[Any]:
        """All open connections."""
        return self._open

    def protocol(self, **options: Any) -> Connection:
        """Creates the object for a new connection; uvicorn calls this method in place of its own class."""
        self._open = options["server_state"].connections
        return Connection(self, **options)

    def install(self, server: uvicorn.Server | None) -> None:
        """Makes a uvicorn server, which must not listen yet, use these limits.

        If `server` is None, another HTTP server runs the application, and a warning is logged.
        """
        if server is None:
            logger.warning("no limits on connections, because the command uvicorn does not run this process")
            return
        self._max_num = min(
            self._max_num, _raise_file_limit(self._max_num + NUM_OTHER_FILES) - NUM_OTHER_FILES
        )
        self._open = server.server_state.connections
        if server.config.http_protocol_class is not HttpToolsProtocol:
            logger.warning(
                "no limits on connections, because uvicorn runs with --http %s", server.config.http
            )
            return
        server.config.http_protocol_class = self.protocol  # type: ignore[assignment]
        logger.info(
            "at most %d connections", self._max_num, extra=fields("limits", max_connections=self._max_num)
        )

    def protect(self, app: ASGIApp) -> ASGIApp:
        """Wraps `app`: while there are too many connections, all requests except probes get `server_busy`."""

        def layer(scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
            if scope["type"] == "http" and len(self._open) > self._max_num and scope["path"] not in PROBES:
                return as_exchange(error_response(ServerBusy()))(scope, receive, send)
            return app(scope, receive, send)

        return layer

    def admit(self, connection: Connection) -> None:
        """Makes room for a new connection; closes the new connection if there is no room."""
        self._waiting[connection] = None
        is_full = len(self._open) > self._max_num
        if is_full and not self._was_full:
            logger.warning(
                "%d connections are open: closing those that wait", self._max_num, extra=fields("full")
            )
        self._was_full = is_full
        if not is_full:
            return
        oldest = next(iter(self._waiting))
        if oldest is connection:
            oldest = next(iter(self._arriving), connection)
        if oldest is not connection or len(self._open) > self._max_num + NUM_RESERVED:
            self._cut(oldest)

    def _cut(self, connection: Connection) -> None:
        self.forget(connection)
        self._open.discard(connection)
        connection.transport.abort()

    def note_waiting(self, connection: Connection) -> None:
        """Records that a connection waits for its client to send a request."""
        self.forget(connection)
        self._waiting[connection] = None

    def note_arriving(self, connection: Connection) -> None:
        """Records that a request's head has arrived, and its body begins."""
        self.forget(connection)
        self._arriving[connection] = None

    def note_busy(self, connection: Connection) -> None:
        """Records that a request has arrived."""
        self._arriving.pop(connection, None)

    def forget(self, connection: Connection) -> None:
        """Forgets a connection that is closed."""
        self._waiting.pop(connection, None)
        self._arriving.pop(connection, None)

    async def run(self) -> None:
        """Checks all connections once a second, without end."""
        while True:
            await asyncio.sleep(SWEEP_S)
            self.sweep()

    def sweep(self) -> None:
        """Ends all connections that exceed a time limit."""
        for connection in [entry for entry in self._open if isinstance(entry, Connection)]:
            self._check(connection, self.clock())

    def _check(self, connection: Connection, now: float) -> None:
        progress, settings = connection.progress, self._settings
        if _is_over(progress.refused_since, LINGER_S, now):
            connection.transport.close()
        elif _is_over(progress.head_since, settings.head_limit_s, now):
            connection.end_head()
        # The route that reads the body has the same limit, and answers with an error.
        elif _is_over(progress.body_since, settings.body_limit_s + CLOSE_LIMIT_S, now):
            connection.transport.abort()
        num_unsent = connection.transport.get_write_buffer_size()
        if num_unsent == 0 or num_unsent < progress.num_unsent or progress.stalled_since is None:
            progress.stalled_since = now
        progress.num_unsent = num_unsent
        limit_s = CLOSE_LIMIT_S if connection.transport.is_closing() else settings.send_limit_s
        if num_unsent and now - progress.stalled_since >= limit_s:
            logger.info("cut a connection whose client does not read", extra=fields("cut_connection"))
            connection.transport.abort()

    def end_after(self, limit_s: float) -> None:
        """Closes all connections that are still open after `limit_s`, so that uvicorn can end."""
        asyncio.get_running_loop().call_later(limit_s, self._cut_all)

    def _cut_all(self) -> None:
        for connection in list(self._open):
            connection.transport.abort()


def _is_over(since: float | None, limit_s: float, now: float) -> bool:
    return since is not None and now - since >= limit_s


def _raise_file_limit(num_wanted: int) -> int:
    """Raises the number of files that the process may open, as far as allowed; returns the new number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < num_wanted:
        soft = num_wanted if hard == resource.RLIM_INFINITY else min(num_wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return num_wanted if soft == resource.RLIM_INFINITY else soft
