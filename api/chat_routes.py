"""The routes that create a chat completion, resume its stream, and abort it."""

from collections.abc import Collection
from typing import Any, Literal

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from api.auth import ApiKeyCheck
from api.body import BodyReader
from api.contract.answer import AnswerWriter, Heading
from api.contract.chat_answer import BodyWriter, ChunkWriter
from api.contract.chat_messages import ChatMessage
from api.contract.chat_request import ChatCompletionRequest
from api.contract.json_body import is_long
from api.contract.server_events import DONE, render_resumption
from api.contract.steps import StepRunner, Steps, each
from api.contract.strict import parsed
from api.exchange_log import exchange_of
from api.generation import (
    Chat,
    check_num_sequences,
    check_resumable,
    find_begun,
    model_in,
    new_request,
    resume_position,
    wants_detach,
)
from api.relay.relay import Relay
from api.responses import GenerationCall, GenerationResponse
from shared.errors import InvalidRequest, RequestNotFound
from shared.messages import GenerationRequest
from shared.settings import ApiSettings

CHAT_COMPLETIONS = "/v1/chat/completions"
RESUME = CHAT_COMPLETIONS + "/{request_id}/stream"
ABORT = CHAT_COMPLETIONS + "/{request_id}"


class Deleted(msgspec.Struct, frozen=True):
    """The JSON answer to an abort."""

    id: str
    object: Literal["chat.completion.deleted"]
    deleted: bool


def add_chat_routes(router: APIRouter, relay: Relay, settings: ApiSettings, keys: ApiKeyCheck) -> None:
    """Adds the routes of this module to `router`, whose dependency checks the API keys."""
    queue, runner, bodies = relay.queue, StepRunner(), BodyReader(settings)

    @router.post(CHAT_COMPLETIONS, summary="Continue a conversation", tags=["chat"])
    async def create_chat_completion(request: Request) -> Response:
        """Answers with one JSON object or, with `stream: true`, with server-sent events."""
        body, messages = await _read_chat(request, bodies, runner)
        admit_until = queue.deadline()
        card = await queue.fetch_card(body.model, admit_until)
        client = keys.client_of(request)
        generation = new_request(
            "chatcmpl",
            card,
            settings,
            sampling=body.to_sampling(),
            chat=Chat(messages, body.to_template_inputs()),
            tenant=client.tenant,
            cache_salt=body.cache_salt,
            detached=wants_detach(request),
        )
        generation = _with_choices(generation, body, settings)
        call = GenerationCall(generation, _writer(generation, body), client.tenant, admit_until)
        return GenerationResponse(relay, settings, call)

    @router.get(RESUME, summary="Resume a stream", tags=["chat"])
    async def resume_chat_completion(
        request_id: str, request: Request, include_usage: bool = False
    ) -> Response:
        """Streams the events after `Last-Event-ID`; only for requests sent with `X-Lorelay-Detach: true`."""
        first_event_no = resume_position(request, request_id)
        client = keys.client_of(request)
        found = await queue.find_request(request_id, client)
        check_resumable(found, first_event_no)
        if found.has_ended and first_event_no == found.num_events:
            rest = render_resumption(request_id, first_event_no) + DONE
            return Response(rest, media_type="text/event-stream")
        begun = await find_begun(queue, found.request, first_event_no)
        writer = _stream_writer(found.request, include_usage, begun)
        call = GenerationCall(found.request, writer, client.tenant, queue.deadline(), first_event_no)
        return GenerationResponse(relay, settings, call)

    @router.delete(ABORT, summary="Abort a request", tags=["chat"])
    async def abort_chat_completion(request_id: str, request: Request) -> Response:
        """Removes a queued request, or stops a running one; a client that waits for events gets an error."""
        await queue.find_request(request_id, keys.client_of(request))
        if await queue.abort(request_id) == "gone":
            raise RequestNotFound("The request has ended already.")
        deleted = Deleted(request_id, "chat.completion.deleted", True)
        return Response(msgspec.json.encode(deleted), media_type="application/json")


def _with_choices(
    request: GenerationRequest, body: ChatCompletionRequest, settings: ApiSettings
) -> GenerationRequest:
    """Returns the request with the body's number of choices, after a check of this number."""
    changed = msgspec.structs.replace(request, n=body.num_choices, continuous_usage=body.continuous_usage)
    check_num_sequences(changed, settings)
    return changed


async def _read_chat(
    request: Request, bodies: BodyReader, runner: StepRunner
) -> tuple[ChatCompletionRequest, list[dict[str, Any]]]:
    """Reads and parses the body of a request, and records for the log line which model it names."""
    exchange = exchange_of(request.scope)
    async with bodies.read(request) as raw:
        try:
            body, messages = await runner.run(parse_chat(raw), is_long=is_long(raw))
        except InvalidRequest:
            exchange.note_model(model_in(raw))
            raise
    exchange.note_model(body.model)
    return body, messages


def parse_chat(raw: bytes) -> Steps[tuple[ChatCompletionRequest, list[dict[str, Any]]]]:
    """Parses a request body step by step; returns the parsed body, and its messages for the chat template."""
    body = yield from parsed(ChatCompletionRequest, raw, {"messages": ChatMessage})
    messages = yield from each(ChatMessage.to_template, body.messages)
    return body, messages


def _writer(request: GenerationRequest, body: ChatCompletionRequest) -> AnswerWriter:
    if body.stream:
        return _stream_writer(request, body.include_usage)
    return BodyWriter(_heading(request), request.n)


def _stream_writer(
    request: GenerationRequest, include_usage: bool, begun: Collection[int] = ()
) -> ChunkWriter:
    """`begun`: the choices of which the client of a resumed stream has text already; else empty."""
    return ChunkWriter(
        _heading(request),
        include_usage=include_usage,
        # A stream that is resumed later than at its first event lacks the counts until then.
        continuous_usage=request.continuous_usage and not begun,
        with_ids=request.detached,
        begun=begun,
    )


def _heading(request: GenerationRequest) -> Heading:
    return Heading(request.request_id, request.created, request.model)
