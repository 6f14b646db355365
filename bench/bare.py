"""A Starlette app that only streams chunks, for a comparison of its CPU time per token with the API's.

`uvicorn --factory bench.bare:create_app`
"""

from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from api.contract.answer import Heading
from api.contract.chat_answer import ChunkWriter
from api.contract.server_events import DONE
from shared.messages import StreamEvent


def create_app() -> Starlette:
    """Creates an app with two routes: one that streams, and `/ready`."""
    return Starlette(
        routes=[
            Route("/v1/chat/completions", _stream, methods=["POST"]),
            Route("/ready", lambda _: Response()),
        ]
    )


async def _stream(request: Request) -> Response:
    """Streams `max_tokens` chunks in the format of Lorelay's API."""
    body = await request.json()
    writer = ChunkWriter(Heading("chatcmpl-" + "0" * 32, 0, body["model"]), include_usage=False, begun=[0])
    chunk = writer.render(StreamEvent(event_no=0, text=" river"))

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(body["max_tokens"]):
            yield chunk
        yield DONE

    return StreamingResponse(chunks(), media_type="text/event-stream")
