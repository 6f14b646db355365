"""The routes of chat completions: create one, resume its stream, abort it."""

import re
import time
import uuid
from typing import Literal

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from api.auth import ApiKeyCheck
from api.body import read_body
from api.contract.answer import AnswerWriter, Heading
from api.contract.chat_answer import BodyWriter, ChunkWriter
from api.contract.chat_request import ChatCompletionRequest
from api.contract.server_events import DONE, render_resumption
from api.contract.strict import parse
from api.relay.relay import Relay
from api.responses import GenerationCall, GenerationResponse
from shared.errors import InvalidRequest, RequestNotFound
from shared.messages import GenerationRequest, ModelCard
from shared.queue.api_streams import FoundRequest
from shared.settings import ApiSettings

CHAT_COMPLETIONS = "/v1/chat/completions"
DETACH = "X-Lorelay-Detach"
LAST_EVENT_ID = "Last-Event-ID"


class Deleted(msgspec.Struct, frozen=True):
    """The JSON answer to an abort."""

    id: str
    object: Literal["chat.completion.deleted"]
    deleted: bool


def add_chat_routes(router: APIRouter, relay: Relay, settings: ApiSettings, keys: ApiKeyCheck) -> None:
    """Adds the routes to `router`, which checks API keys."""
    queue = relay.queue

    @router.post(CHAT_COMPLETIONS, summary="Continue a conversation", tags=["chat"])
    async def create_chat_completion(request: Request) -> Response:
        """Answers with one JSON object or, with `stream: true`, with server-sent events."""
        body = parse(ChatCompletionRequest, await read_body(request, settings.max_body_bytes))
        admit_until = queue.deadline()
        card = await queue.fetch_card(body.model, admit_until)
        client = keys.client_of(request)
        detached = _wants_detach(request)
        generation = _to_generation_request(body, card, settings, tenant=client, detached=detached)
        writer = _writer(generation, stream=bool(body.stream), include_usage=body.include_usage)
        call = GenerationCall(generation, writer, client, admit_until)
        return GenerationResponse(relay, settings, call)

    @router.get(CHAT_COMPLETIONS + "/{request_id}/stream", summary="Resume a stream", tags=["chat"])
    async def resume_chat_completion(
        request_id: str, request: Request, include_usage: bool = False
    ) -> Response:
        """Streams the events after `Last-Event-ID`; only for requests sent with `X-Lorelay-Detach: true`."""
        first_event_no = _first_event_no(request, request_id)
        client = keys.client_of(request)
        found = await queue.find_request(request_id, client)
        _check_resumable(found, first_event_no)
        if found.has_ended and first_event_no == found.num_events:
            rest = render_resumption(request_id, first_event_no) + DONE
            return Response(rest, media_type="text/event-stream")
        writer = _stream_writer(found.request, include_usage, is_resumed=first_event_no > 0)
        call = GenerationCall(found.request, writer, client, queue.deadline(), first_event_no)
        return GenerationResponse(relay, settings, call)

    @router.delete(CHAT_COMPLETIONS + "/{request_id}", summary="Abort a request", tags=["chat"])
    async def abort_chat_completion(request_id: str, request: Request) -> Response:
        """Removes a queued request, or stops a running one; a client that waits for it gets an error."""
        await queue.find_request(request_id, keys.client_of(request))
        if await queue.abort(request_id) == "gone":
            raise RequestNotFound("The request has ended already.")
        deleted = Deleted(request_id, "chat.completion.deleted", True)
        return Response(msgspec.json.encode(deleted), media_type="application/json")


def _writer(request: GenerationRequest, *, stream: bool, include_usage: bool) -> AnswerWriter:
    return _stream_writer(request, include_usage) if stream else BodyWriter(_heading(request), request.n)


def _stream_writer(
    request: GenerationRequest, include_usage: bool, *, is_resumed: bool = False
) -> ChunkWriter:
    return ChunkWriter(
        _heading(request),
        include_usage=include_usage,
        with_ids=request.detached,
        begun=range(request.n) if is_resumed else (),
    )


def _heading(request: GenerationRequest) -> Heading:
    return Heading(request.request_id, request.created, request.model)


def _to_generation_request(
    body: ChatCompletionRequest, card: ModelCard, settings: ApiSettings, *, tenant: str, detached: bool
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
        tenant=tenant,
        wait_limit_s=None if detached else settings.queue_time_limit_s,
        generation_limit_s=settings.generation_limit_s,
        detached=detached,
    )


def _wants_detach(request: Request) -> bool:
    value = request.headers.get(DETACH, "false").lower()
    if value not in ("true", "false"):
        raise InvalidRequest(f"The header {DETACH} is 'true' or 'false', not {value!r}.", param=DETACH)
    return value == "true"


def _first_event_no(request: Request, request_id: str) -> int:
    """Returns the number of the first event to send: one after `Last-Event-ID`, or 0 without this header."""
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
