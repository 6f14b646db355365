"""Events of a completion as chunks and as one body."""

import json
from typing import Any

from api.contract.answer import Heading
from api.contract.completion_answer import TextBodyWriter, TextChunkWriter
from shared.messages import FinishReason, PositionLogprobs, StreamEvent, TokenLogprob, Usage

HEADING = Heading("cmpl-1", 1_700_000_000, "m")
USAGE = Usage(prompt_tokens=3, completion_tokens=4, cached_tokens=2)


def position(chosen: bytes, *others: bytes) -> PositionLogprobs:
    tokens = [TokenLogprob(number, text, -float(number)) for number, text in enumerate((chosen, *others), 1)]
    return PositionLogprobs(tokens[0], tuple(tokens[1:]))


STREAM = [
    StreamEvent(0, index=1, token_ids=(7,), text="b", logprobs=(position(b"b", b"c"),)),
    StreamEvent(1, index=0, token_ids=(8,), text="", logprobs=(position("ä".encode()[:1], "ä".encode()),)),
    StreamEvent(
        2, index=0, token_ids=(9,), text="ä ", logprobs=(position("ä".encode()[1:] + b" "),),
        finish_reason=FinishReason.LENGTH,
    ),
    StreamEvent(
        3, index=1, token_ids=(10,), text="B", logprobs=(position(b"B"),),
        finish_reason=FinishReason.STOP, usage=USAGE,
    ),
]  # fmt: skip
FIRST = {
    "tokens": ["b"],
    "token_logprobs": [-1.0],
    "top_logprobs": [{"c": -2.0, "b": -1.0}],
    "text_offset": [0],
}
PARTS = ["bytes:\\xc3", "bytes:\\xa4\\x20"]
"""The names of the two tokens that share one character."""


def decode(rendered: bytes) -> list[dict[str, Any]]:
    *blocks, done, end = rendered.split(b"\n\n")
    assert (done, end) == (b"data: [DONE]", b"")
    return [json.loads(block.removeprefix(b"data: ")) for block in blocks]


def test_each_event_is_a_chunk_with_text_logprobs_and_the_reason_of_the_end() -> None:
    writer = TextChunkWriter(HEADING, include_usage=True)
    *chunks, usage = decode(b"".join(writer.render(event) for event in STREAM))
    assert chunks[0] == {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 1_700_000_000,
        "model": "m",
        "choices": [{"index": 1, "text": "b", "logprobs": FIRST, "finish_reason": None}],
        "usage": None,
    }
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [(c["index"], c["text"], c["finish_reason"]) for c in choices] == [
        (1, "b", None),
        (0, "", None),
        (0, "ä ", "length"),
        (1, "B", "stop"),
    ]
    assert [c["logprobs"]["tokens"][0] for c in choices] == ["b", *PARTS, "B"]
    assert [c["logprobs"]["text_offset"] for c in choices[::3]] == [[0], [1]]
    assert (usage["choices"], usage["usage"]["total_tokens"]) == ([], 7)


def test_chunks_have_no_usage_unless_the_client_asks_for_it() -> None:
    writer = TextChunkWriter(HEADING, include_usage=False)
    chunks = decode(b"".join(writer.render(event) for event in STREAM))
    assert not any("usage" in chunk for chunk in chunks)


def test_an_event_that_adds_nothing_makes_no_chunk_and_each_other_names_its_id_if_asked() -> None:
    writer = TextChunkWriter(HEADING, include_usage=False, with_ids=True)
    assert writer.render(StreamEvent(0, token_ids=(5,))) == b""
    assert writer.render(StreamEvent(1, token_ids=(5,), text="a")).startswith(b"id: cmpl-1:1\n")


def test_one_body_holds_all_choices_in_order_of_their_index() -> None:
    writer = TextBodyWriter(HEADING, num_choices=2)
    *pieces, rendered = [writer.render(event) for event in STREAM]
    assert not any(pieces)
    body = json.loads(rendered)
    assert [(c["index"], c["text"], c["finish_reason"]) for c in body["choices"]] == [
        (0, "ä ", "length"),
        (1, "bB", "stop"),
    ]
    assert body["choices"][0]["logprobs"]["tokens"] == PARTS
    assert body["choices"][1]["logprobs"]["text_offset"] == [0, 1]
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    assert body["object"] == "text_completion"
