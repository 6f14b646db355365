"""The route that creates a chat completion."""

from collections.abc import Collection
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from api.auth import ApiKeyCheck
from api.body import BodyReader
from api.contract.answer import AnswerWriter
from api.contract.chat_answer import BodyWriter, ChunkWriter
from api.contract.chat_messages import ChatMessage
from api.contract.chat_request import ChatCompletionRequest, UsualChatRequest
from api.contract.json_body import is_long
from api.contract.steps import StepRunner, Steps, each
from api.contract.strict import parsed
from api.exchange_log import exchange_of
from api.generation import Input, heading_of, model_in, new_request, wants_detach
from api.grammars import GrammarChecker
from api.relay.relay import Relay
from api.responses import GenerationCall, GenerationResponse
from api.stored_routes import Kind, add_stored_routes
from shared.errors import InvalidRequest
from shared.messages import GenerationRequest
from shared.settings import ApiSettings

CHAT_COMPLETIONS = "/v1/chat/completions"
ID_PREFIX = "chatcmpl"


def add_chat_routes(
    router: APIRouter, relay: Relay, settings: ApiSettings, keys: ApiKeyCheck, grammars: GrammarChecker
) -> None:
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
            ID_PREFIX,
            card,
            settings,
            body,
            Input(messages, body.to_template_inputs(), body.to_tool_choice()),
            tenant=client.tenant,
            detached=wants_detach(request),
        )
        generation = await grammars.bind(generation, body.form)
        if generation.tool_choice and (generation.tool_choice.is_required or generation.sampling.grammar):
            await grammars.check_tools(generation.template_inputs.tools)
        call = GenerationCall(generation, _writer(generation, body), client.tenant, admit_until)
        return GenerationResponse(relay, settings, call)

    add_stored_routes(
        router,
        relay,
        settings,
        keys,
        Kind(CHAT_COMPLETIONS, ID_PREFIX, "chat.completion.deleted", _stream_writer, tag="chat"),
    )


async def _read_chat(
    request: Request, bodies: BodyReader, runner: StepRunner
) -> tuple[UsualChatRequest, list[dict[str, Any]]]:
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


def parse_chat(raw: bytes) -> Steps[tuple[UsualChatRequest, list[dict[str, Any]]]]:
    """Parses a request body step by step; returns the parsed body, and its messages for the chat template."""
    body = yield from parsed((UsualChatRequest, ChatCompletionRequest), raw, {"messages": ChatMessage})
    messages = yield from each(ChatMessage.to_template, body.messages)
    return body, messages


def _writer(request: GenerationRequest, body: UsualChatRequest) -> AnswerWriter:
    if body.stream:
        return _stream_writer(request, body.include_usage)
    has_logprobs = request.sampling.logprobs is not None
    return BodyWriter(
        heading_of(request),
        request.n,
        has_logprobs=has_logprobs,
        has_legacy_calls=_has_legacy_calls(request),
    )


def _has_legacy_calls(request: GenerationRequest) -> bool:
    return request.tool_choice is not None and request.tool_choice.is_legacy


def _stream_writer(
    request: GenerationRequest, include_usage: bool, begun: Collection[int] = ()
) -> ChunkWriter:
    """`begun`: the choices of which the client of a resumed stream has text already; else empty."""
    return ChunkWriter(
        heading_of(request),
        include_usage=include_usage,
        # A stream that is resumed later than at its first event lacks the counts until then.
        continuous_usage=request.continuous_usage and not begun,
        with_ids=request.detached,
        has_legacy_calls=_has_legacy_calls(request),
        begun=begun,
    )
