"""The HTTP application: `uvicorn --factory api.main:create_app`.

At SIGTERM uvicorn first waits for open connections, for ever unless `--timeout-graceful-shutdown` (whole
seconds) says how long; then it cancels their tasks, each of which sends its client `server_draining`; only
then comes the lifespan's end. So whoever starts uvicorn passes `api_drain_s` as that flag.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from api import docs, errors
from api.relay import Relay
from api.routes import build_routes
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
        yield
        await relay.close()

    app = FastAPI(title=docs.TITLE, lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    errors.install(app)
    app.include_router(build_routes(relay, settings))
    docs.install(app, relay)
    app.state.relay = relay
    return app
