"""The HTTP routes: OpenAI's endpoints under `/v1`, and the health probes."""

from typing import Any, Literal

import msgspec
from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from api.auth import ApiKeyCheck
from api.chat_routes import add_chat_routes
from api.completion_routes import add_completion_routes
from api.contract.server_events import on_one_line
from api.exchange_log import exchange_of
from api.grammars import GrammarChecker
from api.keyring import Keyring
from api.relay.queue_client import QueueClient
from api.relay.relay import Relay
from shared.errors import ModelNotFound
from shared.model_cards import ModelCard
from shared.settings import ApiSettings


class Model(msgspec.Struct, frozen=True):
    """A model that a request can name."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    """The model's own name; only `lorelay status` shows the folder or Hugging Face id of its weights."""
    parent: str | None
    """Name of the base model if this is an adapter, else None."""
    max_model_len: int
    served: bool
    """True if a live worker serves the model now. Requests for other models wait for a worker."""


class ModelList(msgspec.Struct, frozen=True):
    """All models; each base comes before its adapters."""

    object: Literal["list"]
    data: list[Model]


class Status(msgspec.Struct, frozen=True):
    """The answer to a probe."""

    status: Literal["ok"]


def build_routes(relay: Relay, settings: ApiSettings, keyring: Keyring) -> APIRouter:
    """Builds all routes; the routes under `/v1` require an API key if the settings name keys."""
    router = APIRouter()
    keys = ApiKeyCheck(keyring)
    keyed = APIRouter(dependencies=[Depends(keys)])
    grammars = GrammarChecker(settings)
    add_chat_routes(keyed, relay, settings, keys, grammars)
    add_completion_routes(keyed, relay, settings, keys, grammars)
    _add_model_routes(keyed, relay.queue)
    # FastAPI tries the routes in this order, and the first one gets the most requests.
    router.include_router(keyed)
    _add_probes(router, relay.queue)
    return router


def _add_model_routes(router: APIRouter, queue: QueueClient) -> None:
    @router.get("/v1/models", summary="List the models", tags=["models"])
    async def list_models() -> Response:
        """Lists the base models and their adapters."""
        models = await queue.fetch_models()
        return _json(ModelList("list", [_to_model(card, served) for card, served in models]))

    @router.get("/v1/models/{model_id:path}", summary="Describe one model", tags=["models"])
    async def retrieve_model(model_id: str, request: Request) -> Response:
        """Describes one model, whose name may contain slashes."""
        exchange_of(request.scope).note_model(model_id)
        if not model_id:
            raise ModelNotFound
        return _json(_to_model(*await queue.fetch_model(model_id)))


def _add_probes(router: APIRouter, queue: QueueClient) -> None:
    @router.head("/health", include_in_schema=False)
    @router.get("/health", summary="Is the process up?", tags=["probes"])
    async def health() -> Response:
        """Answers 200 as long as the process runs."""
        return _json(Status("ok"))

    @router.head("/ready", include_in_schema=False)
    @router.get("/ready", summary="Can it take requests?", tags=["probes"])
    async def ready() -> Response:
        """Answers 503 while Redis can't be reached or refuses writes; needs no worker."""
        await queue.ping()
        return _json(Status("ok"))

    @router.head("/ready/{model_id:path}", include_in_schema=False)
    @router.get("/ready/{model_id:path}", summary="Can this model answer?", tags=["probes"])
    async def model_ready(model_id: str, request: Request) -> Response:
        """Answers 503 while no live worker serves the model, or while `/ready` answers 503."""
        exchange_of(request.scope).note_model(model_id)
        await queue.ping_model(model_id)
        return _json(Status("ok"))


def _to_model(card: ModelCard, served: bool) -> Model:
    return Model(
        id=card.name,
        object="model",
        created=card.created,
        owned_by="lorelay",
        root=card.name,
        parent=card.base if card.adapter_name is not None else None,
        max_model_len=card.max_model_len,
        served=served,
    )


def _json(value: Any) -> Response:
    return Response(on_one_line(msgspec.json.encode(value)), media_type="application/json")
