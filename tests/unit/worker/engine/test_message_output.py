"""Answers with calls and reasoning in the engine: their events, their ends, and what a new worker sends."""

from collections.abc import Mapping
from collections.abc import Sequence as Items
from types import MappingProxyType
from typing import Any

import pytest

from shared.messages import FinishReason, GenerationRequest, SamplingParams, StreamEvent, ToolChoice
from tests.fakes import EOS, FakeDetokenizer, FakeModel, FakeTokenizer, build_engine, encoded
from tests.streams import BASE, make_request
from worker.engine.sequence import Sequence
from worker.engine.served_models import ServedModel, ServedModels
from worker.model.call_formats import hermes
from worker.model.message_parser import MessageParser, MessageParsers

CALL = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "f"}}]
ANSWER = f"<think>hm</think>I look.\n{CALL}\n{CALL}"
NUM_TOKENS_OF_CALL = len(CALL.removesuffix("</tool_call>")) + 1
MARK = 3
"""A special token; the parser needs its text."""


class SilentMarks(FakeDetokenizer):
    """Returns no text for the special tokens."""

    def add(self, token_id: int) -> str:
        return "" if token_id == MARK else super().add(token_id)


class DividingTokenizer(FakeTokenizer):
    """Divides the answers to all chats in the format of Hermes."""

    special_tokens: Mapping[int, str] = MappingProxyType({EOS: "<eos>", MARK: "</tool_call>"})

    def detokenizer(self) -> FakeDetokenizer:
        return SilentMarks()

    def message_parser(self, request: GenerationRequest, index: int, prompt: Items[int]) -> MessageParser:
        parsers = MessageParsers(hermes(reasons=True))
        return parsers.create(TOOLS, ["f"], f"{index}-{{}}".format, {MARK: "</tool_call>"}, "")


def engine_that_answers(text: str) -> Any:
    """Builds an engine whose model writes `text`, one character per token, and the mark as one token."""
    pieces = [*map(ord, text.replace("</tool_call>", chr(MARK))), EOS]

    def next_token(seq: Sequence) -> int:
        return pieces[seq.num_output_tokens]

    model = FakeModel(next_token, max_model_len=1024)
    model.served = ServedModels(ServedModel(BASE, "m1", "folder", DividingTokenizer(), created=1))
    return build_engine(model)


def request_of(choice: ToolChoice | None = None, **values: Any) -> GenerationRequest:
    sampling = SamplingParams(temperature=0, **values.pop("sampling", {}))
    return make_request(request_id="r", sampling=sampling, tool_choice=choice or ToolChoice(), **values)


def run(text: str, request: GenerationRequest, log: Items[StreamEvent] = ()) -> list[StreamEvent]:
    engine = engine_that_answers(text)
    assert engine.add_request(request, encoded(engine, request), log) == []
    events: list[StreamEvent] = []
    while engine.has_work:
        events += [output.event for output in engine.step()]
    return events


def message(events: Items[StreamEvent], index: int = 0) -> tuple[str, str, list[tuple[str, str]]]:
    """The content, the reasoning and the calls of one choice."""
    own = [event for event in events if event.index == index]
    calls = [(call.id, call.arguments) for event in own for call in event.tool_calls]
    return "".join(event.text for event in own), "".join(event.reasoning for event in own), calls


def test_an_answer_has_content_reasoning_and_calls_and_ends_with_the_reason_of_calls() -> None:
    events = run(ANSWER, request_of(n=2))
    for index in (0, 1):
        calls = [(f"{index}-{number}", '{"a": 1}') for number in (0, 1)]
        assert message(events, index) == ("I look.", "hm", calls)
    assert [event.finish_reason for event in events if event.finish_reason] == ["tool_calls"] * 2
    # The last character of "<think>" begins the reasoning, and that of "</think>" ends it.
    assert events[-1].reasoning_tokens == 2 * len(">hm</think>")


def test_a_worker_that_takes_over_after_any_event_sends_the_rest_and_nothing_twice() -> None:
    request = request_of(n=2)
    whole = run(ANSWER, request)
    for num_written in range(1, len(whole)):
        rest = run(ANSWER, request, whole[:num_written])
        for index in (0, 1):
            assert told(whole[:num_written] + rest, index) == told(whole, index)
        assert (rest[-1].usage, rest[-1].reasoning_tokens) == (whole[-1].usage, whole[-1].reasoning_tokens)


def told(events: Items[StreamEvent], index: int) -> list[tuple[Any, ...]]:
    """All that the events tell of one choice, event by event."""
    return [
        (event.token_ids, event.text, event.reasoning, event.tool_calls, event.finish_reason)
        for event in events
        if event.index == index
    ]


def test_a_choice_of_a_single_call_ends_after_it() -> None:
    events = run(ANSWER, request_of(ToolChoice(is_single=True)))
    assert message(events)[2] == [("0-0", '{"a": 1}')]
    assert events[-1].finish_reason == "tool_calls"
    assert message(run(ANSWER, request_of()))[2] != message(events)[2]


@pytest.mark.parametrize(
    ("text", "sampling", "reason", "calls"),
    [
        ("plain", {}, FinishReason.STOP, []),
        (CALL, {"max_tokens": NUM_TOKENS_OF_CALL - 1}, FinishReason.LENGTH, [("0-0", '{"a": 1}')]),
        (CALL, {"max_tokens": 42}, FinishReason.LENGTH, [("0-0", '{"a"')]),
        (CALL, {"stop": ("arguments",)}, FinishReason.STOP, []),
        (f"{CALL}END", {"stop": ("END",)}, FinishReason.TOOL_CALLS, [("0-0", '{"a": 1}')]),
    ],
)
def test_the_finish_reason_says_whether_the_model_or_a_limit_ended_the_answer(
    text: str, sampling: dict[str, Any], reason: FinishReason, calls: list[tuple[str, str]]
) -> None:
    events = run(text, request_of(sampling=sampling))
    assert events[-1].finish_reason == reason
    assert message(events)[2] == calls


def test_the_text_of_a_call_that_a_stop_string_cut_stays_content() -> None:
    events = run(CALL, request_of(sampling={"stop": ("arguments",)}))
    assert message(events)[0] == '<tool_call>{"name": "f", "'
