"""An answer's text is divided into content, reasoning and calls, whatever the pieces in which it comes."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from shared.messages import ToolCallPart
from worker.engine.records import MessagePart
from worker.model.call_formats import CallFormat, gemma, hermes, llama, mistral, qwen3_5
from worker.model.message_parser import MessageParsers

PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": PARAMETERS}} for name in ("f", "g")]
CALL_F = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
CALL_G = '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'


def divide(
    format: CallFormat,
    text: str,
    *,
    step: int,
    is_cut: bool = False,
    prompt_end: str = "",
    names: tuple[str, ...] = ("f", "g"),
) -> MessagePart:
    """Returns the whole message, from pieces of `step` characters."""
    parser = MessageParsers(format).create(TOOLS, names, "id{}".format, {}, prompt_end)
    pieces = [text[start : start + step] for start in range(0, len(text), step)]
    parts = [*map(parser.add, pieces), parser.finish(is_cut=is_cut)]
    calls = tuple(call for part in parts for call in part.tool_calls)
    assert parser.num_calls == len(calls)
    return MessagePart("".join(p.content for p in parts), "".join(p.reasoning for p in parts), calls)


def call(number: int, name: str, arguments: str) -> ToolCallPart:
    return ToolCallPart(number, f"id{number}", name, arguments)


F, G = call(0, "f", '{"a": 1}'), call(1, "g", "{}")
HERMES, THINKING = hermes(reasons=False), hermes(reasons=True)


@pytest.mark.parametrize("step", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    ("format", "text", "message"),
    [
        (HERMES, CALL_F, MessagePart("", "", (F,))),
        (HERMES, f"{CALL_F}\n{CALL_G}", MessagePart("", "", (F, G))),
        (HERMES, f"Let me see.\n{CALL_F}\n", MessagePart("Let me see.", "", (F,))),
        (HERMES, f"A {CALL_F} B {CALL_G} C", MessagePart("A B C", "", (F, G))),
        (HERMES, "no call < here", MessagePart("no call < here")),
        (THINKING, "<think>\nhm\n\nso\n</think>\n\nyes", MessagePart("yes", "hm\n\nso")),
        (THINKING, f"<think>hm</think>{CALL_F}", MessagePart("", "hm", (F,))),
        (llama(reasons=False), ' {"name": "f", "parameters": {"a": 1}}', MessagePart("", "", (F,))),
        (llama(reasons=False), 'so {"name": "f"}', MessagePart('so {"name": "f"}')),
        (
            mistral(reasons=False),
            '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]',
            MessagePart("", "", (F, G)),
        ),
        (
            qwen3_5(reasons=True),
            "Ok\n<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>",
            MessagePart("Ok", "", (F,)),
        ),
        (
            gemma(reasons=False),
            '<|tool_call>call:f{a:1,b:<|"|>x y<|"|>}<tool_call|>',
            MessagePart("", "", (call(0, "f", '{"a": 1, "b": "x y"}'),)),
        ),
    ],
)
def test_an_answer_has_the_parts_that_its_form_says(
    format: CallFormat, text: str, message: MessagePart, step: int
) -> None:
    assert divide(format, text, step=step) == message


@pytest.mark.parametrize("step", [1, 5, 1000])
@pytest.mark.parametrize(
    "text",
    [
        'A <tool_call>{"name": bad}</tool_call> B',
        "A <tool_call>[1]</tool_call> B",
        'A <tool_call>{"name": "unknown", "arguments": {}}</tool_call> B',
        'A <tool_call>{"name": "f"}</tool_call> B',
        "A <tool_call></tool_call> B",
        'A <tool_call>{"name": "f", "arguments": {"a": "not closed',
        "A <tool_call>" + "[" * 100_000 + "</tool_call>",
        "A </tool_call> <tool_cal",
    ],
)
def test_text_that_is_no_call_stays_content(text: str, step: int) -> None:
    assert divide(HERMES, text, step=max(step, len(text) // 1000)) == MessagePart(text)


def test_only_allowed_tools_are_called() -> None:
    assert divide(HERMES, CALL_F, step=3, names=("g",)) == MessagePart(CALL_F)
    assert divide(THINKING, f"a {CALL_F} b", step=3, names=()) == MessagePart(f"a {CALL_F} b")


@pytest.mark.parametrize(
    ("format", "text", "arguments"),
    [
        (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": [1, "x', '{"a": [1, "x'),
        (HERMES, '<tool_call>\n{"name": "f", "argu', ""),
        (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": 1}}', '{"a": 1}'),
        (llama(reasons=False), '{"name": "f", "parameters": {"a"', '{"a"'),
        (
            qwen3_5(reasons=False),
            "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n<parameter=b>",
            '{"a": 1',
        ),
    ],
)
def test_a_call_that_was_cut_has_the_beginning_of_its_arguments(
    format: CallFormat, text: str, arguments: str
) -> None:
    assert divide(format, text, step=4, is_cut=True) == MessagePart("", "", (call(0, "f", arguments),))


def test_an_answer_that_ends_without_the_closing_tag_has_the_call_if_it_is_complete() -> None:
    assert divide(HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1}}', step=3).tool_calls == (F,)


@pytest.mark.parametrize("prompt_end", ["<|im_start|>assistant\n<think>\n", "<think>"])
def test_reasoning_may_begin_in_the_prompt(prompt_end: str) -> None:
    for text in ("hm</think>yes", "hm\n</think>\n\nyes"):
        assert divide(THINKING, text, step=2, prompt_end=prompt_end) == MessagePart("yes", "hm")
    closed = "<think>\n\n</think>\n\n"
    assert divide(THINKING, "yes", step=2, prompt_end=closed) == MessagePart("yes")


def test_a_tokenizers_own_response_template_is_followed() -> None:
    template: Mapping[str, Any] = {
        "defaults": {"role": "assistant"},
        "start_anchor": "<bot>",
        "fields": {
            "thinking": {"open": "<hm>", "close": "</hm>"},
            "tool_calls": {
                "open_pattern": r"\[call (?P<name>\w+)\]",
                "close": "[/call]",
                "content": "kv-lines",
                "repeats": True,
                "transform": {"function": {"name": "{name}", "arguments": "{content}"}},
            },
            "content": {"close": "<end>"},
        },
    }
    message = divide(
        CallFormat(template), "so</hm>Yes.[call g]b: x\n[/call]<end>", step=3, prompt_end="a <bot><hm>"
    )
    assert (message.content, message.reasoning) == ("Yes.", "so")
    (found,) = message.tool_calls
    assert (found.name, json.loads(found.arguments)) == ("g", {"b": "x"})


@pytest.mark.parametrize("arguments", ['{"a": "\\ud800"}', '{"a": 1e999}', '{"a": NaN}', '"\\ud800"'])
def test_arguments_reach_the_client_as_text_that_every_json_parser_reads_or_stay_content(
    arguments: str,
) -> None:
    text = f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>'
    message = divide(HERMES, text, step=1000)
    assert message.tool_calls or message.content == text
    for found in message.tool_calls:
        assert json.loads(found.arguments.encode()) == json.loads(arguments)
        assert "Infinity" not in found.arguments


def test_text_without_an_end_takes_no_more_than_linear_time() -> None:
    # With a cubic or quadratic pattern, each of these would take minutes, and the test's time would be up.
    for form in (HERMES, qwen3_5(reasons=False), mistral(reasons=False)):
        divide(form, "a" + " " * 200_000 + "b", step=200_000)
    tags = "<tool_call><function=f><parameter=a>" + " " * 20_000
    divide(qwen3_5(reasons=False), tags, step=20_000, is_cut=True)
    prompt_end = "\0<tool_call><function=f><parameter=a>" + " " * 5_000
    assert divide(qwen3_5(reasons=False), "Hello!", step=3, prompt_end=prompt_end).content == "Hello!"
