"""The formats in which models write tool calls and reasoning, and the choice of a model's format.

A format is a response template of transformers (`transformers.utils.chat_parsing`), which says where the
parts of an answer begin and end. A tokenizer may bring its own. For other tokenizers, the chat template
renders a chat with a call, and the text of this call shows the format.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from shared.errors import LorelayError
from shared.messages import TemplateInputs

Render = Callable[[list[dict[str, Any]], TemplateInputs], str]
"""Renders a chat; raises `LorelayError` if the chat template refuses it."""

CALLS, REASONING, CONTENT = "tool_calls", "reasoning_content", "content"
"""Names of the fields of response templates."""
REASONINGS = (REASONING, "thinking", "reasoning")
"""All names that response templates have for reasoning."""
NO_ANCHOR = "\0"
"""Anchor of the formats that need none; response templates must have one."""
SPACE = "space"
"""Group of a pattern for the white space before a call, which is content only if there is no call."""
THINK, END_THINK = "<think>", "</think>"

PROBED_TOOL = "lorelay_probe"
_PROBE: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": PROBED_TOOL,
        "description": "lorelay description",
        "parameters": {"type": "object", "properties": {"text": {"type": "string"}}},
    },
}


@dataclass(frozen=True)
class CallSyntax:
    """The exact text of calls, for grammars that force a model to call tools.

    Calls are written as `first call between call … last`, and each call as
    `name_after NAME arguments_after ARGUMENTS end`, where the arguments are JSON.
    """

    first: str
    between: str
    """Empty if an answer has at most one call."""
    last: str
    name_after: str
    arguments_after: str
    end: str = "}"


@dataclass(frozen=True)
class CallFormat:
    """The format of a model's answers that have calls or reasoning."""

    template: Mapping[str, Any]
    """The response template; empty if answers of the model have no parts."""
    syntax: CallSyntax | None = None
    """None if no grammar can force calls of this format."""
    open_text: str = ""
    """Text with which a call begins, for answers in which it turns out to be no call."""
    close_text: str = ""
    id_length: int | None = None
    """Length that the chat template demands of the ids of calls; None if it takes any."""

    @property
    def has_calls(self) -> bool:
        """True if the format has a place for calls."""
        return CALLS in self.template.get("fields", {})

    @property
    def has_reasoning(self) -> bool:
        """True if the format has a place for reasoning."""
        return any(name in self.template.get("fields", {}) for name in REASONINGS)

    def mentions(self, token: str) -> bool:
        """True if the template contains the text of this token, in a pattern or literally."""
        return any(token in text.replace("\\", "") for text in _texts(self.template))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _template(calls: dict[str, Any] | None, *, reasons: bool) -> Mapping[str, Any]:
    """Builds a response template whose text outside of calls and reasoning is content."""
    fields: dict[str, Any] = {}
    if reasons:
        fields[REASONING] = {"open": THINK, "close": END_THINK, "content": "text"}
    if calls is not None:
        fields[CALLS] = calls
    if not fields:
        return MappingProxyType({})
    # Own formats get only the answer, and never a prompt in which an anchor would have to be found.
    return {"start_anchor": NO_ANCHOR, "fields": {**fields, CONTENT: {"content": "text"}}}


_FUNCTION = {"type": "function", "function": {"name": "{content.name}", "arguments": "{content.arguments}"}}


def hermes(*, reasons: bool) -> CallFormat:
    """The format of Hermes and Qwen 2 to 3: JSON in `<tool_call>` tags. The tool prompt asks for it, too."""
    calls = {
        "open_pattern": r"(?<!\s)(?P<space>\s*)<tool_call>",
        "close": "</tool_call>",
        "repeats": True,
        "content": "json",
        "transform": _FUNCTION,
    }
    syntax = CallSyntax(
        first="<tool_call>\n",
        between="\n</tool_call>\n<tool_call>\n",
        last="\n</tool_call>",
        name_after='{"name": ',
        arguments_after=', "arguments": ',
    )
    return CallFormat(_template(calls, reasons=reasons), syntax, "<tool_call>", "</tool_call>")


def qwen3_5(*, reasons: bool) -> CallFormat:
    """The format of Qwen 3.5: `<function=NAME>` with a tag for each parameter, in `<tool_call>` tags."""
    calls = {
        "open_pattern": r"(?<!\s)(?P<space>\s*)<tool_call>\s*<function=(?P<name>[^>\n]+)>",
        "close_pattern": r"</function>\s*</tool_call>",
        "repeats": True,
        "content": "xml-inline",
        "content_args": {
            # White space is stripped afterwards: as a part of the pattern, it would take cubic time.
            "tag_pattern": r"<parameter=(?P<key>[^>\n]+)>(?P<value>.*?)</parameter>",
            "value_parser": {"name": "text"},
        },
        "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
    }
    return CallFormat(_template(calls, reasons=reasons), None, "<tool_call>", "</tool_call>")


def gemma(*, reasons: bool) -> CallFormat:
    """The format of Gemma 4: `call:NAME` and JSON without quotes around keys, between control tokens."""
    calls = {
        "open_pattern": r"<\|tool_call>call:(?P<name>\w+)",
        "close": "<tool_call|>",
        "repeats": True,
        "content": "json",
        "content_args": {"unquoted_keys": True, "string_delims": [['<|"|>', '<|"|>']]},
        "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
    }
    return CallFormat(_template(calls, reasons=reasons), None, "<|tool_call>call:", "<tool_call|>")


def llama(*, reasons: bool) -> CallFormat:
    """The format of Llama 3: the whole answer is a JSON object with `name` and `parameters`."""
    calls = {
        "open_pattern": r'\A\s*(?:<\|python_tag\|>)?(?=\{\s*"name"\s*:)',
        "repeats": True,
        "content": "json",
        "transform": {
            "type": "function",
            "function": {"name": "{content.name}", "arguments": "{content.parameters}"},
        },
    }
    syntax = CallSyntax(
        first="", between="", last="", name_after='{"name": ', arguments_after=', "parameters": '
    )
    return CallFormat(_template(calls, reasons=reasons), syntax)


def mistral(*, reasons: bool) -> CallFormat:
    """The format of Mistral's tokenizers up to version 3: a JSON list of calls after `[TOOL_CALLS]`."""
    calls = {
        "open_pattern": r"(?<!\s)(?P<space>\s*)\[TOOL_CALLS\]\s*",
        "content": "json",
        "transform_each": True,
        "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{arguments}"}},
    }
    syntax = CallSyntax(
        first="[TOOL_CALLS] [",
        between=", ",
        last="]",
        name_after='{"name": ',
        arguments_after=', "arguments": ',
    )
    return CallFormat(_template(calls, reasons=reasons), syntax, "[TOOL_CALLS]", id_length=9)


def without_calls(*, reasons: bool) -> CallFormat:
    """The format of a model whose answers have no calls."""
    return CallFormat(_template(None, reasons=reasons))


MARKS: Mapping[str, Callable[..., CallFormat]] = {
    f"<function={PROBED_TOOL}>": qwen3_5,
    f"<|tool_call>call:{PROBED_TOOL}": gemma,
    "[TOOL_CALLS]": mistral,
    '<tool_call>\n{"name"': hermes,
    f'{{"name": "{PROBED_TOOL}", "parameters":': llama,
}
"""Text by which a rendered call shows its format; the first one found counts."""


def find_format(
    render: Render, response_template: Mapping[str, Any] | None, source: str
) -> CallFormat | None:
    """Returns the format of a model's answers; None if the template does not show tools to the model.

    If the template shows tools, but writes calls in an unknown format, the result is the Hermes format.

    `response_template`: the tokenizer's own, which takes precedence. `source`: text of the chat template.
    """
    if not (response_template or _shows_tools(render)):
        return None
    shown = _rendered_call(render)
    found = next((make for mark, make in MARKS.items() if mark in shown), hermes)
    format = found(reasons=END_THINK in source)
    return replace(format, template=response_template) if response_template else format


def _shows_tools(render: Render) -> bool:
    chat = [{"role": "user", "content": "lorelay question"}]
    try:
        return PROBED_TOOL in render(chat, TemplateInputs(tools=[_PROBE]))
    except LorelayError:
        return False


def _rendered_call(render: Render) -> str:
    call = {"name": PROBED_TOOL, "arguments": json.dumps({"text": "lorelay argument"})}
    chat: list[dict[str, Any]] = [
        {"role": "user", "content": "lorelay question"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "call00000", "type": "function", "function": call}],
        },
        {"role": "tool", "content": "lorelay result", "tool_call_id": "call00000", "name": PROBED_TOOL},
    ]
    try:
        return render(chat, TemplateInputs(tools=[_PROBE]))
    except LorelayError:
        return ""
