"""Events as chunks and as one body, also of several choices."""

import json
from typing import Any

import pytest

from api.contract.answer import Heading
from api.contract.chat_answer import BodyWriter, ChunkWriter
from api.contract.server_events import DONE
from shared.messages import FinishReason, PositionLogprobs, StreamEvent, TokenLogprob, ToolCallPart, Usage

HEADING = Heading("chatcmpl-1", 1_700_000_000, "m")
USAGE = Usage(prompt_tokens=3, completion_tokens=4, cached_tokens=2)
STREAM = [
    StreamEvent(0, index=1, text="b"),
    StreamEvent(1, index=0, text="\u00e4\n\U0001f600"),
    StreamEvent(2, index=1, text="B", finish_reason=FinishReason.LENGTH),
    StreamEvent(3, index=0, finish_reason=FinishReason.STOP, usage=USAGE),
]


def decode(rendered: bytes) -> list[dict[str, Any]]:
    *blocks, done, end = rendered.split(b"\n\n")
    assert (done, end) == (b"data: [DONE]", b"")
    return [json.loads(block.removeprefix(b"data: ")) for block in blocks]


def test_the_chunks_of_several_choices_interleave_and_each_has_its_own_begin_and_end() -> None:
    writer = ChunkWriter(HEADING, include_usage=False)
    chunks = decode(b"".join(writer.render(event) for event in STREAM))
    assert [
        (choice["index"], choice["delta"], choice["finish_reason"])
        for [choice] in (c["choices"] for c in chunks)
    ] == [
        (1, {"role": "assistant", "content": ""}, None),
        (1, {"content": "b"}, None),
        (0, {"role": "assistant", "content": ""}, None),
        (0, {"content": "\u00e4\n\U0001f600"}, None),
        (1, {"content": "B"}, None),
        (1, {}, "length"),
        (0, {}, "stop"),
    ]
    assert not any("usage" in chunk for chunk in chunks)


def test_an_event_that_releases_no_text_makes_no_chunk() -> None:
    writer = ChunkWriter(HEADING, include_usage=False)
    writer.render(StreamEvent(0, text="a"))
    assert writer.render(StreamEvent(1, token_ids=(5,))) == b""


def test_one_body_holds_all_choices_in_order_of_their_index() -> None:
    writer = BodyWriter(HEADING, num_choices=2)
    *pieces, rendered = [writer.render(event) for event in STREAM]
    assert not any(pieces)
    body = json.loads(rendered)
    assert [(c["index"], c["message"]["content"], c["finish_reason"]) for c in body["choices"]] == [
        (0, "\u00e4\n\U0001f600", "stop"),
        (1, "bB", "length"),
    ]
    assert body["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


@pytest.mark.parametrize("include_usage", [False, True])
def test_every_text_of_any_model_is_framed_alike(include_usage: bool) -> None:
    texts = ["text", '"text"', 'a "quote"', "\u00e4\n\U0001f600", "%b"]
    writer = ChunkWriter(Heading("chatcmpl-1", 1, 'text"text'), include_usage=include_usage, begun=[0])
    chunks = decode(b"".join(writer.render(StreamEvent(n, text=text)) for n, text in enumerate(texts)) + DONE)
    choice = {"index": 0, "logprobs": None, "finish_reason": None}
    heading = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": 'text"text'}
    usage = {"usage": None} if include_usage else {}
    assert chunks == [
        heading | {"choices": [choice | {"delta": {"content": text}}]} | usage for text in texts
    ]


def test_continuous_usage_counts_the_tokens_of_each_chunk() -> None:
    so_far = Usage(prompt_tokens=3, completion_tokens=2, cached_tokens=2)
    stream = [
        StreamEvent(0, token_ids=(5, 6), text='a "text"', usage_so_far=so_far),
        StreamEvent(1, token_ids=(7,)),
        StreamEvent(2, token_ids=(8,), text="b", finish_reason=FinishReason.STOP, usage=USAGE),
    ]
    writer = ChunkWriter(HEADING, include_usage=True, continuous_usage=True)
    chunks = decode(b"".join(writer.render(event) for event in stream))
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [2, 2, 4, 4, 4]
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {3}
    assert chunks[1]["choices"][0]["delta"] == {"content": 'a "text"'}
    assert chunks[-1]["choices"] == []


def test_continuous_usage_of_an_earlier_worker_is_null_until_the_end() -> None:
    writer = ChunkWriter(HEADING, include_usage=True, continuous_usage=True)
    *before, last = decode(b"".join(writer.render(event) for event in STREAM))
    assert [chunk["usage"] for chunk in before[:-3]] == [None] * 4
    assert last["usage"]["prompt_tokens"] == 3


def test_continuous_usage_needs_include_usage() -> None:
    writer = ChunkWriter(HEADING, include_usage=False, continuous_usage=True)
    chunks = decode(b"".join(writer.render(event) for event in STREAM))
    assert not any("usage" in chunk for chunk in chunks)


def position(token_bytes: bytes, *top: tuple[bytes, float]) -> PositionLogprobs:
    alternatives = tuple(TokenLogprob(n, text, logprob) for n, (text, logprob) in enumerate(top))
    return PositionLogprobs(TokenLogprob(9, token_bytes, -0.5), alternatives)


LOGPROBS = [
    StreamEvent(0, token_ids=(1,), logprobs=(position(b"\xf0\x9f", (b"a\n", -0.25), (b"", -9999.0)),)),
    StreamEvent(1, token_ids=(2,), text="\U0001f600", logprobs=(position(b"\x98\x80"),)),
    StreamEvent(
        2, token_ids=(3,), logprobs=(position(b"<e>"),), finish_reason=FinishReason.STOP, usage=USAGE
    ),
]
"""A character of two tokens, and an end token without text."""
CONTENT = [
    {
        "token": "\ufffd",
        "logprob": -0.5,
        "bytes": [0xF0, 0x9F],
        "top_logprobs": [
            {"token": "a\n", "logprob": -0.25, "bytes": [97, 10]},
            {"token": "", "logprob": -9999.0, "bytes": []},
        ],
    },
    {"token": "\ufffd\ufffd", "logprob": -0.5, "bytes": [0x98, 0x80], "top_logprobs": []},
    {"token": "<e>", "logprob": -0.5, "bytes": [60, 101, 62], "top_logprobs": []},
]


def test_every_token_has_its_log_probabilities_in_the_stream_also_while_its_text_is_held_back() -> None:
    writer = ChunkWriter(HEADING, include_usage=False)
    chunks = decode(b"".join(writer.render(event) for event in LOGPROBS))
    assert [(c["choices"][0]["delta"], c["choices"][0]["logprobs"]) for c in chunks] == [
        ({"role": "assistant", "content": ""}, None),
        ({"content": ""}, {"content": CONTENT[:1], "refusal": None}),
        ({"content": "\U0001f600"}, {"content": CONTENT[1:2], "refusal": None}),
        ({"content": ""}, {"content": CONTENT[2:], "refusal": None}),
        ({}, None),
    ]


def test_a_body_has_the_log_probabilities_of_all_tokens_of_each_choice() -> None:
    writer = BodyWriter(HEADING, 2, has_logprobs=True)
    body = json.loads([writer.render(event) for event in LOGPROBS][-1])
    assert [choice["logprobs"] for choice in body["choices"]] == [
        {"content": CONTENT, "refusal": None},
        {"content": [], "refusal": None},
    ]


CALLS = [
    StreamEvent(0, text="I look.", reasoning="hm"),
    StreamEvent(1, tool_calls=(ToolCallPart(0, "call_1", "f", '{"a"'),)),
    StreamEvent(2, tool_calls=(ToolCallPart(0, arguments=": 1}"), ToolCallPart(1, "call_2", "g", "{}"))),
    StreamEvent(3, finish_reason=FinishReason.TOOL_CALLS, usage=USAGE, reasoning_tokens=2),
]
FIRST_CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


def test_calls_and_reasoning_come_in_deltas_of_their_own() -> None:
    writer = ChunkWriter(HEADING, include_usage=True, begun=[0])
    *chunks, usage = decode(b"".join(writer.render(event) for event in CALLS))
    assert [(c["choices"][0]["delta"], c["choices"][0]["finish_reason"]) for c in chunks] == [
        ({"content": "I look."}, None),
        ({"reasoning_content": "hm"}, None),
        (
            {
                "tool_calls": [
                    {
                        "index": 0,
                        "id": "call_1",
                        "type": "function",
                        "function": {"name": "f", "arguments": '{"a"'},
                    }
                ]
            },
            None,
        ),
        ({"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]}, None),
        (
            {
                "tool_calls": [
                    {
                        "index": 1,
                        "id": "call_2",
                        "type": "function",
                        "function": {"name": "g", "arguments": "{}"},
                    }
                ]
            },
            None,
        ),
        ({}, "tool_calls"),
    ]
    assert usage["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2}


def test_one_body_has_whole_calls_and_null_in_place_of_empty_content() -> None:
    for events, content in ((CALLS, "I look."), (CALLS[1:], None)):
        writer = BodyWriter(HEADING, num_choices=1)
        *_, rendered = [writer.render(event) for event in events]
        choice = json.loads(rendered)["choices"][0]
        assert choice["message"]["content"] == content
        assert choice["message"]["tool_calls"][0] == FIRST_CALL
        assert len(choice["message"]["tool_calls"]) == 2
        assert choice["message"].get("reasoning_content") == ("hm" if content else None)
        assert choice["finish_reason"] == "tool_calls"


def test_the_older_form_has_one_function_call_without_an_id() -> None:
    writer = BodyWriter(HEADING, num_choices=1, has_legacy_calls=True)
    *_, rendered = [writer.render(event) for event in CALLS]
    choice = json.loads(rendered)["choices"][0]
    assert choice["message"]["function_call"] == FIRST_CALL["function"]
    assert "tool_calls" not in choice["message"]
    assert choice["finish_reason"] == "function_call"
    stream = ChunkWriter(HEADING, include_usage=False, has_legacy_calls=True, begun=[0])
    chunks = decode(b"".join(stream.render(event) for event in CALLS))
    assert {"function_call": {"name": "f", "arguments": '{"a"'}} in [c["choices"][0]["delta"] for c in chunks]
    assert chunks[-1]["choices"][0]["finish_reason"] == "function_call"
