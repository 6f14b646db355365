"""Clients of other makers: each reads a stream with its own code and records what it got."""

import asyncio
import contextlib
import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import httpx_sse
import openai
import requests
from openai.types.chat import ChatCompletionChunk

from api.generation import DETACH, LAST_EVENT_ID
from tests.chaos.checker import Reference, find_faults, find_partial_faults
from tests.chaos.recorder import CHAT, READ_LIMIT_S, Answer, Ask, Recorder, Run, note_chunk
from tests.decoders import DONE, by_go, by_lines

NUM_TEXTS = 3
"""Pieces of text after which a resuming client disconnects."""
HTTPX_OPTIONS: dict[str, Any] = {"timeout": READ_LIMIT_S, "trust_env": False, "verify": False}
"""Options without TLS: loading certificates for each of many clients takes the servers' CPU time."""
CLIENT_ERRORS = (httpx.HTTPError, openai.OpenAIError, requests.RequestException, ValueError)
"""Exceptions with which clients report faults; JSON that they can't read is a ValueError."""


@dataclass(eq=False)
class Reading(Answer):
    """One stream as one client saw it."""

    client: str = ""
    is_detached: bool = False
    other_url: str = ""
    """The API at which the client resumes."""
    last_id: str = ""
    """The id of the last event, for clients that expose it."""
    num_comments: int = 0
    """Number of comments, for clients that expose them."""

    @property
    def name(self) -> str:
        """The client's name, and whether its events have ids."""
        return f"{self.client} {'with' if self.is_detached else 'without'} ids"

    @property
    def request_headers(self) -> dict[str, str]:
        """The headers of the request."""
        return {DETACH: "true"} if self.is_detached else {}

    @property
    def is_under_way(self) -> bool:
        """True once some text has come; for a resuming client, after its return."""
        return len(self.chunks) > NUM_TEXTS

    def note(self, chunk: dict[str, Any]) -> None:
        """Records a chunk or an error, in the form in which the client delivers it."""
        self.status, self.request_id = 200, self.request_id or chunk.get("id", "")
        note_chunk(self, chunk)


Read = Callable[[str, Reading], None]


def read_with_openai(url: str, reading: Reading) -> None:
    """The official client's `create(stream=True)`."""
    with _openai_client(url) as client:
        for chunk in client.chat.completions.create(**_arguments(reading)):
            reading.note(chunk.model_dump())
    reading.num_done = 1


def read_with_async_openai(url: str, reading: Reading) -> None:
    """The official client's `create(stream=True)` under asyncio."""

    async def read() -> None:
        http_client = httpx.AsyncClient(**HTTPX_OPTIONS)
        async with openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http_client
        ) as client:
            async for chunk in await client.chat.completions.create(**_arguments(reading)):
                reading.note(chunk.model_dump())

    asyncio.run(read())
    reading.num_done = 1


def read_with_openai_helper(url: str, reading: Reading) -> None:
    """The official client's `.stream()`, which puts the message together by itself."""
    arguments = _arguments(reading)
    del arguments["stream"]
    with _openai_client(url) as client, client.chat.completions.stream(**arguments) as stream:
        for event in stream:
            if event.type == "chunk":
                reading.note(event.chunk.model_dump())
        whole = stream.current_completion_snapshot.choices[0].message.content
    reading.num_done = 1
    assert whole == reading.text


def read_with_requests(url: str, reading: Reading) -> None:
    """Reads with `requests`, line by line."""
    for data in by_lines(line.decode() for line in _requests_lines(url, reading)):
        _note_data(reading, data)


def read_with_go_decoder(url: str, reading: Reading) -> None:
    """Reads with the older decoder of openai-go."""
    for data in by_go(_requests_lines(url, reading)):
        _note_data(reading, data)


def read_with_httpx_sse(url: str, reading: Reading) -> None:
    """Reads with `httpx-sse`."""
    for event in _httpx_sse_events("POST", url + CHAT, reading.request_headers, json=reading.ask.body):
        _note_event(reading, event)


def leave(url: str, reading: Reading) -> None:
    """Reads with `httpx-sse` and leaves after some text."""
    events = _httpx_sse_events("POST", url + CHAT, reading.request_headers, json=reading.ask.body)
    with contextlib.closing(events):
        for event in events:
            _note_event(reading, event)
            if len(reading.chunks) == NUM_TEXTS:
                return


def resume_with_openai(url: str, reading: Reading) -> None:
    """Resumes with the official client's `get` and its own `Stream`."""
    with _openai_client(url) as client:
        for chunk in client.get(
            f"/chat/completions/{reading.request_id}/stream",
            cast_to=ChatCompletionChunk,
            options={"headers": {LAST_EVENT_ID: reading.last_id}},
            stream=True,
            stream_cls=openai.Stream[ChatCompletionChunk],
        ):
            reading.note(chunk.model_dump())
    reading.num_done += 1


def resume_with_httpx_sse(url: str, reading: Reading) -> None:
    """Resumes with `httpx-sse`, from the last id that it exposed."""
    resumed = f"{url}{CHAT}/{reading.request_id}/stream"
    for event in _httpx_sse_events("GET", resumed, {LAST_EVENT_ID: reading.last_id}):
        _note_event(reading, event)


def and_back(resume: Read) -> Read:
    """A client that leaves after some text and goes on at the other API."""

    def read(url: str, reading: Reading) -> None:
        leave(url, reading)
        resume(reading.other_url, reading)

    return read


READERS: dict[str, Read] = {
    "openai": read_with_openai,
    "AsyncOpenAI": read_with_async_openai,
    "openai .stream()": read_with_openai_helper,
    "requests": read_with_requests,
    "openai-go": read_with_go_decoder,
    "httpx-sse": read_with_httpx_sse,
}
RESUMING: dict[str, Read] = {
    "openai, resumed": and_back(resume_with_openai),
    "httpx-sse, resumed": and_back(resume_with_httpx_sse),
}


class Readers(Recorder):
    """Sends requests by other clients and records what they see."""

    def __init__(self, redis_url: str, readers: Mapping[str, Read], resuming: Mapping[str, Read]) -> None:
        super().__init__(redis_url)
        self._plain = readers
        self._resuming = resuming

    def start_all(self, api_url: str, other_url: str, asks: Sequence[Ask]) -> tuple[list[Reading], Run]:
        """Starts every client, with ids and without, each with a request of its own."""
        modes = [(client, is_detached) for client in self._plain for is_detached in (False, True)]
        modes += [(client, True) for client in self._resuming]
        readings = [
            Reading(ask, client=client, is_detached=is_detached, other_url=other_url)
            for ask, (client, is_detached) in zip(asks[: len(modes)], modes, strict=True)
        ]
        return readings, self.start_answers(api_url, list(readings))

    def exchange(self, api_url: str, answer: Answer) -> None:
        """Reads one stream with the reading's own client."""
        assert isinstance(answer, Reading)
        read = (self._plain | self._resuming)[answer.client]
        try:
            read(api_url, answer)
        except openai.APIError as error:
            if isinstance(error.body, dict):
                answer.errors.append(error.body)
            else:
                answer.failure = repr(error)
        except CLIENT_ERRORS as error:
            answer.failure = repr(error)

    def come_back(self, api_url: str, reading: Reading) -> None:
        """Resumes with `httpx-sse` at this API after an error, from the last id that it exposed."""
        reading.errors.clear()
        reading.num_done = 0
        resume_with_httpx_sse(api_url, reading)
        reading.log = self.read_log(reading.request_id)


def check_complete_readings(readings: Sequence[Reading], reference: Reference) -> None:
    """Checks that every client got the whole fault-free answer, and one end."""
    _report({reading.name: find_faults(reading, reference.of(reading.ask)) for reading in readings})
    for reading in readings:
        if reading.client in ("httpx-sse", "httpx-sse, resumed"):
            last_id = f"{reading.request_id}:{len(reading.log or ()) - 1}" if reading.is_detached else ""
            assert reading.last_id == last_id


def check_broken_readings(readings: Sequence[Reading], reference: Reference, code: str) -> None:
    """Checks that every client got a beginning of the fault-free answer, and one error with this code."""
    _report({reading.name: find_partial_faults(reading, reference.of(reading.ask)) for reading in readings})
    assert {reading.name: reading.error_code for reading in readings} == {
        reading.name: code for reading in readings
    }


def _report(faults: Mapping[str, list[str]]) -> None:
    lines = [f"{name}: {'; '.join(found)}" for name, found in faults.items() if found]
    assert not lines, f"{len(lines)} of {len(faults)} went wrong:\n" + "\n".join(lines)


def _openai_client(url: str) -> openai.OpenAI:
    http_client = httpx.Client(**HTTPX_OPTIONS)
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http_client)


def _arguments(reading: Reading) -> dict[str, Any]:
    """The request as the official client's arguments."""
    body = reading.ask.body
    own = {"ignore_eos": body.pop("ignore_eos")}
    return body | {"extra_body": own, "extra_headers": reading.request_headers}


def _requests_lines(url: str, reading: Reading) -> Iterator[bytes]:
    with requests.Session() as session:
        session.trust_env = False
        arguments = {"json": reading.ask.body, "headers": reading.request_headers}
        with session.post(url + CHAT, stream=True, timeout=READ_LIMIT_S, **arguments) as response:
            for line in response.iter_lines():
                reading.num_comments += line.startswith(b":")
                yield line


def _httpx_sse_events(
    method: str, url: str, headers: Mapping[str, str], **arguments: Any
) -> Generator[httpx_sse.ServerSentEvent]:
    with (
        httpx.Client(**HTTPX_OPTIONS) as client,
        httpx_sse.connect_sse(client, method, url, headers=dict(headers), **arguments) as source,
    ):
        yield from source.iter_sse()


def _note_event(reading: Reading, event: httpx_sse.ServerSentEvent) -> None:
    _note_data(reading, event.data)
    reading.last_id = event.id


def _note_data(reading: Reading, data: str) -> None:
    if data == DONE:
        reading.num_done += 1
    else:
        reading.note(json.loads(data))
