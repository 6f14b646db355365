"""Decoders of real clients for server-sent events: from a stream in pieces to the data of its events."""

import io
from collections.abc import Callable, Iterable, Iterator

import httpx
import httpx_sse
import openai
import requests
from openai.types.chat import ChatCompletionChunk

DONE = "[DONE]"
EVENT_STREAM = {"content-type": "text/event-stream; charset=utf-8"}
Decoder = Callable[[Iterable[bytes]], Iterator[str]]


def by_go(lines: Iterable[bytes]) -> Iterator[str]:
    """Decodes as older openai-go does: every blank line ends an event, even after nothing but a comment."""
    data: list[bytes] = []
    for line in lines:
        name, _, value = line.partition(b":")
        if not line:
            yield b"\n".join(data).decode()
            data = []
        elif name == b"data":
            data.append(value.removeprefix(b" "))


def by_lines(lines: Iterable[str]) -> Iterator[str]:
    """Decodes as a hand-written client does: one line is one event."""
    yield from (line.removeprefix("data: ") for line in lines if line.startswith("data: "))


def _openai(pieces: Iterable[bytes]) -> Iterator[str]:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers=EVENT_STREAM, content=pieces)

    http_client = httpx.Client(transport=httpx.MockTransport(answer))
    with openai.OpenAI(base_url="http://server", api_key="none", http_client=http_client) as client:
        stream_cls = openai.Stream[ChatCompletionChunk]
        stream = client.get("/stream", cast_to=ChatCompletionChunk, stream=True, stream_cls=stream_cls)
        try:
            yield from (chunk.model_dump_json() for chunk in stream)
        except openai.APIError as error:
            yield httpx.Response(200, json={"error": error.body}).text
    yield DONE


def _httpx_sse(pieces: Iterable[bytes]) -> Iterator[str]:
    response = httpx.Response(200, headers=EVENT_STREAM, content=pieces)
    yield from (event.data for event in httpx_sse.EventSource(response).iter_sse())


def _requests(pieces: Iterable[bytes]) -> requests.Response:
    response = requests.Response()
    response.raw = io.BytesIO(b"".join(pieces))
    response.encoding = requests.utils.get_encoding_from_headers(EVENT_STREAM)
    return response


DECODERS: dict[str, Decoder] = {
    "openai": _openai,
    "openai-go": lambda pieces: by_go(_requests(pieces).iter_lines()),
    "httpx-sse": _httpx_sse,
    "httpx": lambda pieces: by_lines(httpx.Response(200, content=pieces).iter_lines()),
    "requests": lambda pieces: by_lines(_requests(pieces).iter_lines(decode_unicode=True)),
}
