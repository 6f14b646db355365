"""The layers around the application: they hold for whatever writes a response."""

from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.responses import Response

from api.main import create_app
from shared.settings import ApiSettings, RedisSettings

CHAT = "/v1/chat/completions"
NO_REDIS = "redis://127.0.0.1:1"


def make_app(**settings: Any) -> FastAPI:
    return create_app(ApiSettings(redis_timeout_s=1, **settings), RedisSettings(redis_url=NO_REDIS))


async def ask(app: FastAPI, method: str, path: str, **fields: Any) -> httpx.Response:
    """Sends one request to the application, without a socket between."""
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:
        return await client.request(method, path, **fields)


WRITERS = {
    "a probe": ("GET", "/health", 200),
    "the documentation page": ("GET", "/docs", 200),
    "the schema": ("GET", "/openapi.json", 200),
    "a style sheet": ("GET", "/docs-assets/swagger-ui.css", 200),
    "a script": ("GET", "/docs-assets/swagger-ui-bundle.js", 200),
    "a missing asset": ("GET", "/docs-assets/nothing.js", 404),
    "an unknown path": ("GET", "/v1/nothing", 404),
    "a wrong method": ("GET", CHAT, 405),
    "a body that is no JSON": ("POST", CHAT, 400),
    "an invalid URL parameter": ("GET", f"{CHAT}/x/stream?include_usage=maybe", 400),
    "a Redis that is away": ("GET", "/v1/models", 503),
    "an unforeseen exception": ("GET", "/crash", 500),
    "a route of text": ("GET", "/text", 200),
}


@pytest.mark.parametrize(("method", "path", "status"), WRITERS.values(), ids=WRITERS)
async def test_every_response_that_is_text_names_its_charset(method: str, path: str, status: int) -> None:
    app = make_app()

    @app.get("/crash", include_in_schema=False)
    async def crash() -> None:
        raise ZeroDivisionError

    @app.get("/text")
    async def text() -> Response:
        return Response("{}", media_type="application/problem+json")

    fields = {"content": b"{", "headers": {"content-type": "application/json"}} if method == "POST" else {}
    response = await ask(app, method, path, **fields)
    assert response.status_code == status
    assert response.headers["content-type"].endswith("; charset=utf-8")
    assert response.headers["content-type"].count("charset") == 1


async def test_an_image_has_no_charset() -> None:
    response = await ask(make_app(), "GET", "/docs-assets/favicon.png")
    assert response.headers["content-type"] == "image/png"
