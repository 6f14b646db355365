"""The HTTP application: `uvicorn --factory api.main:create_app`.

At SIGTERM uvicorn takes no new connections and waits for the open ones; after `api_drain_s` the relay ends
what is still open with `server_draining`, and only then comes the lifespan's end. A shorter
`--timeout-graceful-shutdown` of uvicorn's own cuts that short, with the same error for the clients.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from api import docs, errors
from api.relay.relay import Relay
from api.routes import build_routes
from api.termination import at_termination
from shared import logs
from shared.settings import ApiSettings, RedisSettings


def create_app(settings: ApiSettings | None = None, redis_settings: RedisSettings | None = None) -> FastAPI:
    """The application. What is not given is read from the environment; nothing connects before its start.

    Raises:
        ConfigurationError: a variable is missing or malformed.
    """
    is_process = settings is None and redis_settings is None
    settings = settings or ApiSettings.load()
    if is_process:
        logs.configure(settings.log_level)
    relay = Relay(redis_settings or RedisSettings.load(), settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        relay.start()
        with at_termination(relay.drain):
            yield
        await relay.close()

    app = FastAPI(title=docs.TITLE, lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    errors.install(app)
    app.include_router(build_routes(relay, settings))
    docs.install(app, relay)
    app.state.relay = relay
    return app
