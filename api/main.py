"""The HTTP application: `uvicorn --factory api.main:create_app`.

At SIGTERM uvicorn stops accepting connections and waits for the open responses. After `api_drain_s` the relay
ends the responses that are still open with the error `server_draining`; then the process ends. If uvicorn's
`--timeout-graceful-shutdown` is shorter than `api_drain_s`, clients get the same error earlier. At the end,
connections whose clients don't read are closed.
"""

import asyncio
import gc
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp

from api import docs, errors
from api.connections import LAST_WORDS_S, ConnectionGuard
from api.keyring import Keyring
from api.layers import allow_origins, as_exchange
from api.relay.queue_client import QueueClient
from api.relay.relay import Relay
from api.routes import build_routes
from api.termination import at_termination, running_server
from shared import logs
from shared.settings import ApiSettings, RedisSettings


class Application(FastAPI):
    """FastAPI inside the layers of `api.layers`, which thus see even responses of FastAPI's error handler."""

    def __init__(self, cors_origins: Sequence[str], **options: Any) -> None:
        """Creates the application with FastAPI's `options`; web pages of `cors_origins` may call it."""
        super().__init__(**options)
        self._cors_origins = cors_origins

    def build_middleware_stack(self) -> ASGIApp:
        """Returns FastAPI's middleware inside the layers."""
        return as_exchange(allow_origins(super().build_middleware_stack(), self._cors_origins))


def create_app(settings: ApiSettings | None = None, redis_settings: RedisSettings | None = None) -> FastAPI:
    """Creates the application without connecting to Redis; settings that are None come from the environment.

    Raises:
        ConfigurationError: an environment variable is missing or malformed.
    """
    is_process = settings is None and redis_settings is None
    settings = settings or ApiSettings.load()
    if is_process:
        logs.configure(settings.log_level)
    redis_settings = redis_settings or RedisSettings.load()
    keyring = Keyring(settings)
    relay, guard = (
        Relay(QueueClient(redis_settings, settings), redis_settings, settings),
        ConnectionGuard(settings),
    )

    def drain() -> None:
        relay.drain()
        guard.end_after(settings.api_drain_s + LAST_WORDS_S)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        relay.start()
        watches = [asyncio.create_task(watch) for watch in (keyring.watch(), guard.run())]
        if is_process:
            guard.install(running_server())
            # If garbage collections scanned all objects of the imports, open streams would pause for 40 ms.
            gc.freeze()
        with at_termination(drain):
            yield
        for watch in watches:
            watch.cancel()
        await relay.close()

    app = Application(
        settings.cors_origins,
        title=docs.TITLE,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        # A redirect would lead to the host that the request's own `Host` header names.
        redirect_slashes=False,
    )
    errors.install(app)
    app.include_router(build_routes(relay, settings, keyring))
    docs.install(app, relay)
    app.state.relay, app.state.guard = relay, guard
    return app
