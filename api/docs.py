"""The documentation page and its OpenAPI schema, which need neither an API key nor internet access."""

import copy
from functools import cache
from importlib import resources
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.responses import HTMLResponse, JSONResponse
from starlette.routing import BaseRoute
from starlette.staticfiles import StaticFiles

from api.chat_routes import CHAT_COMPLETIONS
from api.completion_routes import COMPLETIONS
from api.contract import field_table
from api.contract.chat_answer import ChatCompletion, ChatCompletionChunk
from api.contract.chat_request import ChatCompletionRequest
from api.contract.completion_answer import Completion
from api.contract.completion_request import CompletionRequest
from api.contract.strict import StrictModel
from api.errors import ErrorEnvelope
from api.relay.relay import Relay
from api.routes import Model, ModelList, Status
from api.stored_routes import ABORT, RESUME, Deleted
from shared.errors import QueueUnavailable
from shared.model_cards import ModelCard

TITLE = "Lorelay"
VERSION = "0.1.0"
DESCRIPTION = "OpenAI's API for one base model and many LoRA adapters: name an adapter as `model` to use it."
ASSETS = "/docs-assets"
SCHEMA = "/openapi.json"
REFERENCE = "#/components/schemas/{}"
KEYED_PREFIX = "/v1"
ANSWERS: dict[str, dict[str, type]] = {
    CHAT_COMPLETIONS: {"application/json": ChatCompletion, "text/event-stream": ChatCompletionChunk},
    RESUME.format(CHAT_COMPLETIONS): {"text/event-stream": ChatCompletionChunk},
    ABORT.format(CHAT_COMPLETIONS): {"application/json": Deleted},
    COMPLETIONS: {"application/json": Completion, "text/event-stream": Completion},
    RESUME.format(COMPLETIONS): {"text/event-stream": Completion},
    ABORT.format(COMPLETIONS): {"application/json": Deleted},
    "/v1/models": {"application/json": ModelList},
    "/v1/models/{model_id}": {"application/json": Model},
    "/health": {"application/json": Status},
    "/ready": {"application/json": Status},
    "/ready/{model_id}": {"application/json": Status},
}
"""The answers of each path, by media type. A new path needs an entry: without it, there is no schema."""
BODIES: dict[str, type[StrictModel]] = {
    CHAT_COMPLETIONS: ChatCompletionRequest,
    COMPLETIONS: CompletionRequest,
}
"""The request body of each path that takes one."""


def install(app: FastAPI, relay: Relay) -> None:
    """Adds to an application the documentation page (`/` and `/docs`), the page's assets, and the schema."""
    app.mount(ASSETS, StaticFiles(directory=str(resources.files("fastapi_offline") / "static")))

    @app.get("/", include_in_schema=False)
    @app.get("/docs", include_in_schema=False)
    async def page(request: Request) -> HTMLResponse:
        root = request.scope.get("root_path", "").rstrip("/")
        return get_swagger_ui_html(
            openapi_url=f"{root}{SCHEMA}",
            title=TITLE,
            swagger_js_url=f"{root}{ASSETS}/swagger-ui-bundle.js",
            swagger_css_url=f"{root}{ASSETS}/swagger-ui.css",
            swagger_favicon_url=f"{root}{ASSETS}/favicon.png",
            # Without this setting, Swagger UI may send the schema to a validator on the internet.
            swagger_ui_parameters={"validatorUrl": None},
        )

    @app.get(SCHEMA, include_in_schema=False)
    async def schema() -> JSONResponse:
        try:
            models: list[tuple[ModelCard, bool]] | None = await relay.queue.fetch_models()
        except QueueUnavailable:
            models = None
        return JSONResponse(_with_models(static_schema(), models))

    @cache
    def static_schema() -> dict[str, Any]:
        return build_schema(app.routes)


def build_schema(routes: list[BaseRoute]) -> dict[str, Any]:
    """Builds the OpenAPI schema of `routes`, without the list of served models.

    Only the request bodies in `BODIES` are described.

    Raises:
        KeyError: a path is missing in `ANSWERS`.
    """
    schema = get_openapi(title=TITLE, version=VERSION, description=DESCRIPTION, routes=routes)
    components = schema.setdefault("components", {})
    components["securitySchemes"] = {"ApiKey": {"type": "http", "scheme": "bearer"}}
    components["schemas"] = _component_schemas()
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            operation["responses"] = _responses(path)
            if path.startswith(KEYED_PREFIX):
                operation["security"] = [{"ApiKey": []}]
    for path, model in BODIES.items():
        content = {"schema": _reference(model), "example": _example(path, "MODEL")}
        schema["paths"][path]["post"]["requestBody"] = {
            "required": True,
            "content": {"application/json": content},
        }
    return schema


def _component_schemas() -> dict[str, Any]:
    _, bodies = models_json_schema(
        [(model, "validation") for model in BODIES.values()], ref_template=REFERENCE.format("{model}")
    )
    components: dict[str, Any] = bodies["$defs"]
    for model in field_table.MODELS.values():
        for row in field_table.rows(model):
            components[model.__name__]["properties"][row.name]["description"] = row.text
    _, answers = msgspec.json.schema_components(
        [*(cls for answer in ANSWERS.values() for cls in answer.values()), ErrorEnvelope],
        ref_template=REFERENCE.format("{name}"),
    )
    return {**components, **answers}


def _responses(path: str) -> dict[str, Any]:
    answer = {media: {"schema": _reference(cls)} for media, cls in ANSWERS[path].items()}
    error = {"application/json": {"schema": _reference(ErrorEnvelope)}}
    return {
        "200": {"description": "Success", "content": answer},
        "default": {"description": "An error, in OpenAI's form", "content": error},
    }


def _reference(cls: type) -> dict[str, str]:
    return {"$ref": REFERENCE.format(cls.__name__)}


def _example(path: str, model: str) -> dict[str, Any]:
    """Returns an example of a body for a path in `BODIES`; the documentation page sends the example."""
    if path == COMPLETIONS:
        return {"model": model, "prompt": "The capital of France is", "max_tokens": 16, "temperature": 0}
    return {
        "model": model,
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "What is the capital of France?"},
        ],
        "max_tokens": 64,
        "temperature": 0.8,
        "stream": False,
    }


def _with_models(schema: dict[str, Any], models: list[tuple[ModelCard, bool]] | None) -> dict[str, Any]:
    """Copies the schema, lists the models in its description, and names one in its examples.

    `models` has each model's card, and True if a live worker serves the model. If Redis can't be read,
    `models` is None.
    """
    schema = copy.deepcopy(schema)
    schema["info"]["description"] += f"\n\n{_describe(models)}"
    if models:
        named = [card.name for card, served in models if served] or [models[0][0].name]
        for path in BODIES:
            content = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]
            content["example"] = _example(path, named[0])
    return schema


def _describe(models: list[tuple[ModelCard, bool]] | None) -> str:
    if models is None:
        return "The list of models can't be read at the moment."
    if not models:
        return "No model is served yet: start a worker."
    lines = [f"* `{card.name}`{_parentage(card)}{_absence(served)}" for card, served in models]
    return "\n".join(["Models:", "", *lines])


def _absence(served: bool) -> str:
    return "" if served else " (no live worker serves it now)"


def _parentage(card: ModelCard) -> str:
    return "" if card.adapter_name is None else f": adapter of `{card.base}`"
