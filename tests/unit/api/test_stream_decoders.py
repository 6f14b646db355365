"""All that is written to a stream, read by the decoders of real clients."""

import json
from collections.abc import Callable, Iterable

import httpx
import httpx_sse
import pytest

from api.contract.answer import Heading
from api.contract.chat_answer import BodyWriter, ChunkWriter
from api.contract.server_events import DONE, PAUSED_COMMENT, QUEUED_COMMENT, render_data, render_resumption
from api.errors import render_error
from shared.errors import InvalidRequest
from shared.messages import FinishReason, StreamEvent, Usage
from tests.decoders import DECODERS, Decoder

TEXTS = ["one", " two\n\n", "data: three\r\n\r\n", "\u2028four\u2029\u0085", "\u00e9 \u2705", "\x0b\x0c\x1c"]
"""Line separators of every kind among them: of server-sent events, of Unicode, of `str.splitlines`."""
SPLITS: dict[str, Callable[[bytes], Iterable[bytes]]] = {
    "in one piece": lambda body: [body],
    "byte by byte": lambda body: [bytes([byte]) for byte in body],
}


def render_stream(*, with_ids: bool, comment: bytes = b"", model: str = "m") -> bytes:
    """A whole stream of `TEXTS`, with a comment before each event."""
    heading = Heading("chatcmpl-1", 1, model)
    writer = ChunkWriter(heading, include_usage=True, with_ids=with_ids)
    events = [StreamEvent(number, text=text) for number, text in enumerate(TEXTS)]
    events.append(StreamEvent(len(TEXTS), finish_reason=FinishReason.STOP, usage=Usage(1, 2)))
    return b"".join(comment + writer.render(event) for event in events)


def read_texts(datas: Iterable[str]) -> list[str]:
    """The texts of a stream that must consist of chunks and end with its finish, its usage and `[DONE]`."""
    *chunks, finish, usage, done = datas
    assert done == "[DONE]"
    assert json.loads(usage)["usage"]["total_tokens"] == 3
    assert json.loads(finish)["choices"][0]["finish_reason"] == "stop"
    deltas = [json.loads(chunk)["choices"][0]["delta"] for chunk in chunks]
    return [delta["content"] for delta in deltas if delta["content"]]


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("with_ids", [True, False], ids=["with ids", "without ids"])
@pytest.mark.parametrize("comment", [b"", QUEUED_COMMENT, PAUSED_COMMENT, PAUSED_COMMENT * 3])
@pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS)
def test_every_decoder_finds_just_the_events_among_comments(
    decoder: Decoder, comment: bytes, with_ids: bool, split: Callable[[bytes], Iterable[bytes]]
) -> None:
    body = render_stream(with_ids=with_ids, comment=comment)
    assert read_texts(decoder(split(body))) == TEXTS


@pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS)
def test_every_decoder_reads_chunks_of_a_model_whose_name_has_line_separators(decoder: Decoder) -> None:
    body = render_stream(with_ids=True, model="my\u2028model\u0085")
    chunk, *_ = decoder([body])
    assert json.loads(chunk)["model"] == "my\u2028model\u0085"


@pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS)
def test_every_decoder_finds_an_error_after_a_comment(decoder: Decoder) -> None:
    error = InvalidRequest("No such thing as 'a\u2028b\n\nc'.")
    body = PAUSED_COMMENT + render_data(render_error(error)) + DONE
    data, done = decoder([body])
    assert (json.loads(data)["error"]["message"], done) == (error.message, "[DONE]")


@pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS)
def test_every_decoder_finds_the_end_alone_where_nothing_is_left_to_resume(decoder: Decoder) -> None:
    assert list(decoder([render_resumption("chatcmpl-1", 9) + DONE])) == ["[DONE]"]


@pytest.mark.parametrize("comment", [b"", QUEUED_COMMENT, PAUSED_COMMENT])
def test_a_resumed_stream_that_ends_at_once_leaves_its_reader_an_id_to_come_back_with(comment: bytes) -> None:
    error = render_data(render_error(InvalidRequest("x")))
    body = render_resumption("chatcmpl-1", 9) + comment + error + DONE
    response = httpx.Response(200, headers={"content-type": "text/event-stream"}, content=body)
    events = list(httpx_sse.EventSource(response).iter_sse())
    assert [event.id for event in events] == ["chatcmpl-1:8"] * 2


@pytest.mark.parametrize(
    "separator", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\x1e", "\r", "\n"]
)
def test_every_body_in_one_piece_is_one_line(separator: str) -> None:
    text = f"a{separator}b"
    event = StreamEvent(0, text=text, finish_reason=FinishReason.STOP, usage=Usage(1, 2))
    body = BodyWriter(Heading("chatcmpl-1", 1, text), 1).render(event)
    error = render_error(InvalidRequest(text, param=text))
    for encoded in (body, error):
        assert len(encoded.decode().splitlines()) == 1
    assert json.loads(body)["choices"][0]["message"]["content"] == text
    assert json.loads(error)["error"]["param"] == text


def test_no_id_stands_before_the_first_event() -> None:
    assert render_resumption("chatcmpl-1", 0) == b""
