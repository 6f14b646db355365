"""The route that creates a completion, which continues texts or token ids without a chat template."""

from collections.abc import Collection

from fastapi import APIRouter, Request
from starlette.responses import Response

from api.auth import ApiKeyCheck
from api.body import BodyReader
from api.contract.answer import AnswerWriter
from api.contract.completion_answer import TextBodyWriter, TextChunkWriter
from api.contract.completion_request import CompletionRequest
from api.contract.json_body import is_long
from api.contract.steps import StepRunner
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

COMPLETIONS = "/v1/completions"
ID_PREFIX = "cmpl"


def add_completion_routes(
    router: APIRouter, relay: Relay, settings: ApiSettings, keys: ApiKeyCheck, grammars: GrammarChecker
) -> None:
    """Adds the routes of this module to `router`, whose dependency checks the API keys."""
    queue, runner, bodies = relay.queue, StepRunner(), BodyReader(settings)

    @router.post(COMPLETIONS, summary="Continue texts", tags=["completions"])
    async def create_completion(request: Request) -> Response:
        """Answers with one JSON object or, with `stream: true`, with server-sent events."""
        body = await _read(request, bodies, runner)
        admit_until = queue.deadline()
        card = await queue.fetch_card(body.model, admit_until)
        client = keys.client_of(request)
        generation = new_request(
            ID_PREFIX,
            card,
            settings,
            body,
            Input(prompts=body.prompt, echo=bool(body.echo)),
            tenant=client.tenant,
            detached=wants_detach(request),
        )
        writer: AnswerWriter
        if body.stream:
            writer = _stream_writer(generation, body.include_usage)
        else:
            writer = TextBodyWriter(heading_of(generation), generation.num_sequences)
        generation = await grammars.bind(generation, body.form)
        call = GenerationCall(generation, writer, client.tenant, admit_until)
        return GenerationResponse(relay, settings, call)

    add_stored_routes(
        router,
        relay,
        settings,
        keys,
        Kind(COMPLETIONS, ID_PREFIX, "text_completion.deleted", _stream_writer, tag="completions"),
    )


async def _read(request: Request, bodies: BodyReader, runner: StepRunner) -> CompletionRequest:
    """Reads and parses the body of a request, and records for the log line which model it names."""
    exchange = exchange_of(request.scope)
    async with bodies.read(request) as raw:
        try:
            body = await runner.run(parsed((CompletionRequest,), raw), is_long=is_long(raw))
        except InvalidRequest:
            exchange.note_model(model_in(raw))
            raise
    exchange.note_model(body.model)
    return body


def _stream_writer(
    request: GenerationRequest, include_usage: bool, begun: Collection[int] = ()
) -> TextChunkWriter:
    """`begun`: the choices that a resumed stream has begun before; empty if it begins at its first event."""
    return TextChunkWriter(
        heading_of(request),
        include_usage=include_usage,
        # A stream that is resumed later than at its first event lacks the counts until then.
        continuous_usage=request.continuous_usage and not begun,
        with_ids=request.detached,
    )
