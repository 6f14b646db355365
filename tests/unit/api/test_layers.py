"""The layers around the application: they hold for whatever writes a response."""

from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.responses import Response

from api.main import create_app
from shared.errors import ConfigurationError
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

    @app.get("/text", include_in_schema=False)
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


DECLARED_AS_JSON = [
    "application/json",
    "Application/JSON",
    "application/json; charset=utf-8",
    'application/json;charset="UTF-8"',
    "application/json; version=1",
    "application/vnd.api+json",
]
DECLARED_AS_OTHER = [
    None,
    "",
    "text/plain",
    "text/plain; application/json",
    "text/json",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    "application/jsonp",
    "image/svg+json",
    "application/json; charset=utf-16",
    "application/octet-stream",
    "text/plain, application/json",
]


@pytest.mark.parametrize("content_type", DECLARED_AS_JSON)
async def test_a_body_declared_as_json_is_read(content_type: str) -> None:
    response = await ask(make_app(), "POST", CHAT, content=b"[]", headers={"content-type": content_type})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_request_error")


@pytest.mark.parametrize("content_type", DECLARED_AS_OTHER)
async def test_a_body_that_any_web_page_may_send_is_refused_and_the_way_out_is_told(
    content_type: str | None,
) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    response = await ask(make_app(), "POST", CHAT, content=b"{}", headers=headers)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (
        415,
        "unsupported_media_type",
        "Content-Type",
    )
    assert "Content-Type: application/json" in error["message"]
    assert response.headers["x-should-retry"] == "false"


async def test_of_two_content_types_both_must_be_json() -> None:
    headers = [("content-type", "application/json"), ("content-type", "text/plain")]
    assert (await ask(make_app(), "POST", CHAT, content=b"{}", headers=headers)).status_code == 415


PAGE = "https://chat.example.com"
PREFLIGHT = {
    "origin": PAGE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-os",
}


async def test_no_web_page_of_another_origin_may_call_by_default() -> None:
    preflight = await ask(make_app(), "OPTIONS", CHAT, headers=PREFLIGHT)
    answer = await ask(make_app(), "GET", "/health", headers={"origin": PAGE})
    assert preflight.status_code == 405
    for response in (preflight, answer):
        assert not [name for name in response.headers if name.startswith("access-control-")]


@pytest.mark.parametrize("origins", [(PAGE, "http://localhost:3000"), ("*",)], ids=str)
async def test_a_named_origin_gets_its_preflight_without_a_key_and_every_answer_with_one(
    origins: tuple[str, ...],
) -> None:
    app = make_app(cors_origins=origins, api_keys=("sk-one",))
    allowed = "*" if origins == ("*",) else PAGE

    @app.get("/crash", include_in_schema=False)
    async def crash() -> None:
        raise ZeroDivisionError

    for path in (CHAT, f"{CHAT}/chatcmpl-1", "/v1/models"):
        preflight = await ask(app, "OPTIONS", path, headers=PREFLIGHT)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == allowed
        assert "x-stainless-os" in preflight.headers["access-control-allow-headers"]
        assert {"GET", "POST", "DELETE"} <= set(preflight.headers["access-control-allow-methods"].split(", "))
    for method, path, status in (("POST", CHAT, 401), ("GET", "/v1/nothing", 404), ("GET", "/crash", 500)):
        response = await ask(app, method, path, headers={"origin": PAGE})
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == allowed
        assert "x-request-id" in response.headers["access-control-expose-headers"]
        assert "access-control-allow-credentials" not in response.headers


async def test_an_origin_that_is_not_named_is_refused() -> None:
    app = make_app(cors_origins=("https://other.example.com",))
    preflight = await ask(app, "OPTIONS", CHAT, headers=PREFLIGHT)
    answer = await ask(app, "GET", "/health", headers={"origin": PAGE})
    assert preflight.status_code == 400
    for response in (preflight, answer):
        assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize(
    "origin",
    ["example.com", "https://a.com/", "https://a.com/chat", "https://A.com", "https://u@a.com", "https://"],
)
def test_an_origin_that_no_browser_sends_is_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch, origin: str
) -> None:
    monkeypatch.setenv("LORELAY_CORS_ORIGINS", f"https://b.com {origin}")
    with pytest.raises(ConfigurationError, match=r"LORELAY_CORS_ORIGINS: .* is not an origin"):
        ApiSettings.load()
