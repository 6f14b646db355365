"""The routes for a request that was sent earlier: resume its stream, and abort it."""

from collections.abc import Collection
from typing import Literal, NamedTuple, Protocol

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from api.auth import ApiKeyCheck
from api.contract.answer import AnswerWriter
from api.contract.server_events import DONE, render_resumption
from api.generation import check_resumable, find_begun, resume_position
from api.relay.relay import Relay
from api.responses import GenerationCall, GenerationResponse
from shared.errors import RequestNotFound
from shared.messages import GenerationRequest
from shared.settings import ApiSettings

RESUME = "{}/{{request_id}}/stream"
"""Path of the route that resumes a stream, below the path of its kind."""
ABORT = "{}/{{request_id}}"


class Deleted(msgspec.Struct, frozen=True):
    """The JSON answer to an abort."""

    id: str
    object: Literal["chat.completion.deleted", "text_completion.deleted"]
    deleted: bool


class StreamWriters(Protocol):
    """A function that creates the writer of a request's stream."""

    def __call__(
        self, request: GenerationRequest, include_usage: bool, begun: Collection[int] = ()
    ) -> AnswerWriter:
        """`begun`: the choices of which the client has events already; empty for a new stream."""


class Kind(NamedTuple):
    """A kind of answer, such as a chat completion."""

    path: str
    """Path at which requests are sent; the routes of one request are below it."""
    id_prefix: str
    """Beginning of the ids of these requests."""
    deleted: Literal["chat.completion.deleted", "text_completion.deleted"]
    stream_writer: StreamWriters
    tag: str
    """Heading of the routes on the documentation page."""


def add_stored_routes(
    router: APIRouter, relay: Relay, settings: ApiSettings, keys: ApiKeyCheck, kind: Kind
) -> None:
    """Adds the routes of this module for one kind of answer to `router`, which checks the API keys."""
    queue = relay.queue

    @router.get(RESUME.format(kind.path), summary="Resume a stream", tags=[kind.tag])
    async def resume(request_id: str, request: Request, include_usage: bool = False) -> Response:
        """Streams the events after `Last-Event-ID`; only for requests sent with `X-Lorelay-Detach: true`."""
        _check_kind(request_id)
        first_event_no = resume_position(request, request_id)
        client = keys.client_of(request)
        found = await queue.find_request(request_id, client)
        check_resumable(found, first_event_no)
        if found.has_ended and first_event_no == found.num_events:
            rest = render_resumption(request_id, first_event_no) + DONE
            return Response(rest, media_type="text/event-stream")
        begun = await find_begun(queue, found.request, first_event_no)
        writer = kind.stream_writer(found.request, include_usage, begun)
        call = GenerationCall(found.request, writer, client.tenant, queue.deadline(), first_event_no)
        return GenerationResponse(relay, settings, call)

    @router.delete(ABORT.format(kind.path), summary="Abort a request", tags=[kind.tag])
    async def abort(request_id: str, request: Request) -> Response:
        """Removes a queued request, or stops a running one; a client that waits for events gets an error."""
        _check_kind(request_id)
        await queue.find_request(request_id, keys.client_of(request))
        if await queue.abort(request_id) == "gone":
            raise RequestNotFound("The request has ended already.")
        deleted = Deleted(request_id, kind.deleted, True)
        return Response(msgspec.json.encode(deleted), media_type="application/json")

    def _check_kind(request_id: str) -> None:
        if not request_id.startswith(f"{kind.id_prefix}-"):
            raise RequestNotFound
