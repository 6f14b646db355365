"""The documentation page is complete without the internet, and its schema describes what is served."""

import re
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx
import pytest
from fastapi import FastAPI

from api.contract.chat_request import ChatCompletionRequest
from api.docs import build_schema
from api.main import create_app
from shared.model_cards import ModelCard
from shared.settings import ApiSettings, RedisSettings


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    """A client of an API with a key, and without Redis."""
    app = create_app(ApiSettings(api_keys=("sk",)), RedisSettings(redis_url="redis://127.0.0.1:1"))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://host") as client:
        yield client


@pytest.mark.parametrize("path", ["/", "/docs"])
async def test_every_asset_of_the_page_comes_from_this_host(client: httpx.AsyncClient, path: str) -> None:
    page = (await client.get(path)).text
    assert '"validatorUrl": null' in page
    links = re.findall(r"""(?:src|href|url)\s*[=:]\s*["']([^"']+)["']""", page)
    assert len(links) == 4
    for link in links:
        assert not urlsplit(link).netloc, link
        answer = await client.get(urljoin(path, link))
        assert answer.status_code == 200, link
        assert answer.content
    assert not re.findall(r"https?://", page)


async def test_the_page_finds_its_assets_behind_a_proxy_that_strips_a_prefix() -> None:
    app = create_app(ApiSettings(), RedisSettings(redis_url="redis://127.0.0.1:1"))
    transport = httpx.ASGITransport(app, root_path="/llm")
    async with httpx.AsyncClient(transport=transport, base_url="http://host") as client:
        page = (await client.get("/llm/docs")).text
    assert "url: '/llm/openapi.json'" in page
    assert 'src="/llm/docs-assets/swagger-ui-bundle.js"' in page


async def test_the_schema_explains_every_field_of_a_chat_completion(client: httpx.AsyncClient) -> None:
    schema = (await client.get("/openapi.json")).json()
    content = schema["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]
    assert content["schema"] == {"$ref": "#/components/schemas/ChatCompletionRequest"}
    assert content["example"]["messages"]
    ChatCompletionRequest.model_validate(content["example"])
    properties = schema["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    assert set(properties) == set(ChatCompletionRequest.model_fields)
    assert [name for name, field in properties.items() if not field.get("description")] == []
    for name, part in schema["components"]["schemas"].items():
        if "Message" in name or name in ("TextPart", "StreamOptions", "ToolCall"):
            assert all(
                "description" in field or name.startswith("Assistant")
                for field in part["properties"].values()
            )


@pytest.mark.parametrize(
    ("method", "path", "answers"),
    [
        ("post", "", {"application/json": "ChatCompletion", "text/event-stream": "ChatCompletionChunk"}),
        ("get", "/{request_id}/stream", {"text/event-stream": "ChatCompletionChunk"}),
        ("delete", "/{request_id}", {"application/json": "Deleted"}),
    ],
)
async def test_the_schema_tells_what_each_route_of_chat_completions_answers(
    client: httpx.AsyncClient, method: str, path: str, answers: dict[str, str]
) -> None:
    paths = (await client.get("/openapi.json")).json()["paths"]
    content = paths["/v1/chat/completions" + path][method]["responses"]["200"]["content"]
    references = {media: entry["schema"]["$ref"] for media, entry in content.items()}
    assert references == {media: f"#/components/schemas/{name}" for media, name in answers.items()}


def test_a_path_without_a_described_answer_has_no_schema() -> None:
    app = FastAPI()

    @app.get("/v1/undescribed")
    async def answer() -> str:
        return "text"

    with pytest.raises(KeyError, match="/v1/undescribed"):
        build_schema(app.routes)


async def test_the_schema_refers_to_nothing_that_it_lacks(client: httpx.AsyncClient) -> None:
    response = await client.get("/openapi.json")
    schemas = response.json()["components"]["schemas"]
    references = set(re.findall(r'"\$ref":\s*"#/components/schemas/(\w+)"', response.text))
    assert references
    assert references <= set(schemas)


async def test_the_schema_asks_for_a_key_where_one_is_needed(client: httpx.AsyncClient) -> None:
    paths = (await client.get("/openapi.json")).json()["paths"]
    keyed = {path for path, operations in paths.items() for o in operations.values() if o.get("security")}
    assert keyed == {path for path in paths if path.startswith("/v1/")}
    assert {"/health", "/ready", "/ready/{model_id}"} == set(paths) - keyed


async def test_the_schema_survives_a_redis_that_is_away(client: httpx.AsyncClient) -> None:
    assert "can't be read" in (await client.get("/openapi.json")).json()["info"]["description"]


def card(name: str, adapter_name: str | None = None) -> ModelCard:
    return ModelCard(name, "base", "/m", "v", 1, 9, adapter_name)


@pytest.mark.parametrize(
    ("models", "text"),
    [
        ([], "No model is served yet: start a worker."),
        (
            [(card("base"), True), (card("pirate", "pirate"), False)],
            "Models:\n\n* `base`\n* `pirate`: adapter of `base` (no live worker serves it now)",
        ),
    ],
)
async def test_the_models_and_whether_they_are_served_now_stand_in_the_text(
    models: list[tuple[ModelCard, bool]], text: str
) -> None:
    app = create_app(ApiSettings(), RedisSettings(redis_url="redis://127.0.0.1:1"))

    async def fetch_models() -> list[tuple[ModelCard, bool]]:
        return models

    app.state.relay.queue.fetch_models = fetch_models
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://host") as client:
        first: dict[str, Any] = (await client.get("/openapi.json")).json()
        assert (await client.get("/openapi.json")).json() == first
    assert first["info"]["description"].endswith(text)
