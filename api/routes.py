"""The routes: OpenAI's under `/v1`, the probes beside them."""

import re
import time
import uuid
from typing import Any, Literal

import msgspec
from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from api.auth import ApiKeyCheck
from api.body import read_body
from api.contract.chat_answer import DONE, render_resumption
from api.contract.chat_request import ChatCompletionRequest
from api.contract.strict import parse
from api.relay.relay import Relay
from api.responses import ChatCall, ChatCompletionResponse
from shared.errors import InvalidRequest, ModelNotFound, RequestNotFound
from shared.messages import GenerationRequest, ModelCard
from shared.queue.api_streams import FoundRequest
from shared.settings import ApiSettings

CHAT_COMPLETIONS = "/v1/chat/completions"
DETACH = "X-Lorelay-Detach"
LAST_EVENT_ID = "Last-Event-ID"


class Model(msgspec.Struct, frozen=True):
    """A model that can be named in a request."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    """Where its weights come from."""
    parent: str | None
    """The base model of an adapter."""
    max_model_len: int


class ModelList(msgspec.Struct, frozen=True):
    """All models, each base in front of its adapters."""

    object: Literal["list"]
    data: list[Model]


class Status(msgspec.Struct, frozen=True):
    """What a probe wants to know."""

    status: Literal["ok"]


class Deleted(msgspec.Struct, frozen=True):
    """A request that was aborted."""

    id: str
    object: Literal["chat.completion.deleted"]
    deleted: bool


def build_routes(relay: Relay, settings: ApiSettings) -> APIRouter:
    """The routes on this relay; those under `/v1` ask for an API key where there are any."""
    router = APIRouter()
    keys = ApiKeyCheck(settings.api_keys)
    keyed = APIRouter(dependencies=[Depends(keys)])

    @keyed.post(CHAT_COMPLETIONS, summary="Continue a conversation", tags=["chat"])
    async def create_chat_completion(request: Request) -> Response:
        """Answers with one JSON object, or with `stream: true` in pieces."""
        body = parse(ChatCompletionRequest, await read_body(request, settings.max_body_bytes))
        admit_until = relay.queue.deadline()
        card = await relay.queue.fetch_card(body.model, admit_until)
        call = ChatCall(
            request=_to_generation_request(body, card, settings, detached=_wants_detach(request)),
            stream=bool(body.stream),
            include_usage=body.include_usage,
            client=keys.client_of(request),
            admit_until=admit_until,
        )
        return ChatCompletionResponse(relay, settings, call)

    @keyed.get(CHAT_COMPLETIONS + "/{request_id}/stream", summary="Resume a stream", tags=["chat"])
    async def resume_chat_completion(
        request_id: str, request: Request, include_usage: bool = False
    ) -> Response:
        """The events after `Last-Event-ID`, or all, of a request sent with `X-Lorelay-Detach: true`."""
        first_event_no = _first_event_no(request, request_id)
        client = keys.client_of(request)
        found = await relay.queue.find_request(request_id, client)
        _check_resumable(found, first_event_no)
        if found.has_ended and first_event_no == found.num_events:
            rest = render_resumption(request_id, first_event_no) + DONE
            return Response(rest, media_type="text/event-stream")
        call = ChatCall(
            request=found.request,
            stream=True,
            include_usage=include_usage,
            client=client,
            admit_until=relay.queue.deadline(),
            resume_from=first_event_no,
        )
        return ChatCompletionResponse(relay, settings, call)

    @keyed.delete(CHAT_COMPLETIONS + "/{request_id}", summary="Abort a request", tags=["chat"])
    async def abort_chat_completion(request_id: str, request: Request) -> Response:
        """Queued, it never runs; running, it ends within a step. Its own client gets an error."""
        await relay.queue.find_request(request_id, keys.client_of(request))
        if await relay.queue.abort(request_id) == "gone":
            raise RequestNotFound("The request has ended already.")
        return _json(Deleted(request_id, "chat.completion.deleted", True))

    @keyed.get("/v1/models", summary="List the models", tags=["models"])
    async def list_models() -> Response:
        """The base models and their adapters."""
        cards = await relay.queue.fetch_cards()
        return _json(ModelList("list", [_to_model(card) for card in cards]))

    @keyed.get("/v1/models/{model_id:path}", summary="Describe one model", tags=["models"])
    async def retrieve_model(model_id: str) -> Response:
        """One model; its name may contain slashes."""
        if not model_id:
            raise ModelNotFound
        return _json(_to_model(await relay.queue.fetch_card(model_id, relay.queue.deadline())))

    @router.head("/health", include_in_schema=False)
    @router.get("/health", summary="Is the process up?", tags=["probes"])
    async def health() -> Response:
        """Answers as long as the process does."""
        return _json(Status("ok"))

    @router.head("/ready", include_in_schema=False)
    @router.get("/ready", summary="Can it take requests?", tags=["probes"])
    async def ready() -> Response:
        """503 while Redis can't be reached, or takes no writes."""
        await relay.queue.ping()
        return _json(Status("ok"))

    router.include_router(keyed)
    return router


def _to_generation_request(
    body: ChatCompletionRequest, card: ModelCard, settings: ApiSettings, *, detached: bool
) -> GenerationRequest:
    return GenerationRequest(
        request_id=f"chatcmpl-{uuid.uuid4().hex}",
        model=card.name,
        base=card.base,
        messages=[message.to_template() for message in body.messages],
        sampling=body.to_sampling(),
        adapter_name=card.adapter_name,
        adapter_version=card.version if card.adapter_name is not None else None,
        base_version=(card.version if card.adapter_name is None else card.base_version) or None,
        created=int(time.time()),
        generation_limit_s=settings.generation_limit_s,
        detached=detached,
    )


def _wants_detach(request: Request) -> bool:
    value = request.headers.get(DETACH, "false").lower()
    if value not in ("true", "false"):
        raise InvalidRequest(f"The header {DETACH} is 'true' or 'false', not {value!r}.", param=DETACH)
    return value == "true"


def _first_event_no(request: Request, request_id: str) -> int:
    """The event after the one that `Last-Event-ID` names; without the header, the first."""
    last = request.headers.get(LAST_EVENT_ID)
    if last is None:
        return 0
    of_request, _, event_no = last.rpartition(":")
    if of_request != request_id or not re.fullmatch("[0-9]{1,9}", event_no):
        raise InvalidRequest(
            f"The header {LAST_EVENT_ID} is '{request_id}:' and a number, not {last!r}.", param=LAST_EVENT_ID
        )
    return int(event_no) + 1


def _check_resumable(found: FoundRequest, first_event_no: int) -> None:
    if not found.request.detached:
        raise InvalidRequest(f"The request was sent without {DETACH}: true, so it can't be resumed.")
    if first_event_no > found.num_events:
        raise InvalidRequest(
            f"The header {LAST_EVENT_ID} names an event that is still to come.", param=LAST_EVENT_ID
        )


def _to_model(card: ModelCard) -> Model:
    return Model(
        id=card.name,
        object="model",
        created=card.created,
        owned_by="lorelay",
        root=card.source,
        parent=card.base if card.adapter_name is not None else None,
        max_model_len=card.max_model_len,
    )


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
