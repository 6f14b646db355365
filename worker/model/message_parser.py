"""Divides a model's answer, while it arrives, into content, reasoning and tool calls."""

import json
import re
from collections.abc import Callable, Collection, Mapping
from collections.abc import Sequence as Items
from typing import Any

from transformers.utils.chat_parsing.response_parser import ResponseParser, parse_response
from transformers.utils.chat_parsing.response_templates import ResponseTemplate, load_response_template

from shared.errors import GenerationFailed
from shared.messages import ToolCallPart
from worker.engine.records import MessagePart
from worker.model.call_formats import CALLS, NO_ANCHOR, REASONINGS, SPACE, THINK, CallFormat

_NAME = re.compile(r'"name"\s*:\s*"([^"\\]+)"')
_ARGUMENTS = re.compile(r'"(?:arguments|parameters)"\s*:\s*(?=\{)')
_BODY = "lorelay_body"
_PLACES = ("open", "open_pattern", "close", "close_pattern")
"""Keys of a field that say where its region begins and ends."""


class MessageParsers:
    """Creates the parsers for a model's answers."""

    def __init__(self, format: CallFormat) -> None:
        """Compiles the format's response template.

        Raises:
            ValueError: the template is malformed.
        """
        self.format = format
        self._with_calls = _divided(format, has_calls=True)
        self._without_calls = _divided(format, has_calls=False)

    def create(
        self,
        tools: Items[dict[str, Any]],
        names: Collection[str],
        new_id: Callable[[int], str],
        marks: Mapping[int, str],
        prompt_end: str,
    ) -> "MessageParser":
        """Returns the parser for one answer.

        `names`: the tools that may be called. `new_id`: returns the id of a call, by its number. `marks`: the
        special tokens whose text the parser must get, by id.
        `prompt_end`: the end of the prompt, which may begin the answer, for example with `<think>`.
        """
        template = self._with_calls if names else self._without_calls
        parser = ResponseParser(template, prefix=_prefix(template, prompt_end))
        return MessageParser(parser, self.format, tools, frozenset(names), new_id, marks)


class MessageParser:
    """Divides the text of one answer. The parts depend only on the text, not on the pieces in which it comes.

    transformers' `ResponseParser` finds where calls and reasoning begin and end. A call is read when it is
    complete. Text that looks like a call but is none, or calls an unknown tool, stays content.
    """

    def __init__(
        self,
        parser: ResponseParser,
        format: CallFormat,
        tools: Items[dict[str, Any]],
        names: frozenset[str],
        new_id: Callable[[int], str],
        marks: Mapping[int, str],
    ) -> None:
        """Expects a new `parser`, which has read the end of the prompt; see `MessageParsers.create`."""
        self._parser = parser
        self._format = format
        self._tools = list(tools)
        self._names = names
        self._new_id = new_id
        self.marks = marks
        self._region: str | None = None
        self._reasoning = _Trimmed(at_start=True, at_end=True)
        self._content = _Trimmed()
        self.num_calls = 0
        for event in parser.initial_events:
            self._note_region(event)

    @property
    def is_reasoning(self) -> bool:
        """True if the next text belongs to the reasoning."""
        return self._region in REASONINGS

    def add(self, text: str) -> MessagePart:
        """Returns the parts of the message that a piece of text completes.

        Raises:
            GenerationFailed: the tokenizer's own response template can't be applied to this answer.
        """
        try:
            events = self._parser.feed(text)
        except (ValueError, KeyError) as error:
            raise GenerationFailed(f"The model's response template fails: {error}") from error
        return self._collect(events, self._format.close_text)

    def finish(self, *, is_cut: bool) -> MessagePart:
        """Returns the last parts. If the answer was cut in a call, the call's arguments are incomplete.

        Raises:
            GenerationFailed: the tokenizer's own response template can't be applied to this answer.
        """
        try:
            _, events = self._parser.finalize()
        except (ValueError, KeyError) as error:
            raise GenerationFailed(f"The model's response template fails: {error}") from error
        return self._collect(events, "", is_cut=is_cut)

    def _collect(self, events: list[dict[str, Any]], end: str, *, is_cut: bool = False) -> MessagePart:
        """Returns the parts that these events complete. `end`: the text at which regions of calls end."""
        content, reasoning, calls = "", "", list[ToolCallPart]()
        for event in events:
            self._note_region(event)
            field, kind = event["field"], event["type"]
            if kind == "region_chunk" and field in REASONINGS:
                reasoning += self._reasoning.add(event["text"])
            elif kind == "region_chunk" and field != CALLS:
                content += self._content.add(event["text"])
            elif kind == "region_close" and field in REASONINGS:
                self._reasoning = _Trimmed(at_start=True, at_end=True)
                self._content = _Trimmed(at_start=True)
            elif kind == "region_close" and field == CALLS:
                found, text = self._close_call(event["value"], end, is_cut=is_cut)
                calls += found
                content += self._content.add(text)
                if found:
                    self._content = _Trimmed(at_end=True)
        return MessagePart(content, reasoning, tuple(calls))

    def _note_region(self, event: Mapping[str, Any]) -> None:
        if event["type"] == "region_open":
            self._region = event["field"]
        elif event["type"] == "region_close":
            self._region = None

    def _close_call(
        self, value: Mapping[str, str], end: str, *, is_cut: bool
    ) -> tuple[list[ToolCallPart], str]:
        """Returns the calls that a region has, or else its text, which is content."""
        captures = dict(value)
        body, space = captures.pop(_BODY), captures.pop(SPACE, "")
        # JSON shows whether it is complete; a list of tags that was cut looks like a shorter list.
        shows_end = self._format.template["fields"][CALLS].get("content") == "json"
        calls = self._read(body, captures) if shows_end or not is_cut else None
        if calls is None and is_cut and not self._format.template["fields"][CALLS].get("transform_each"):
            calls = self._read_begun(body, captures)
        if not calls or any(name not in self._names for name, _ in calls):
            return [], space + self._format.open_text + "".join(captures.values()) + body + end
        first = self.num_calls
        self.num_calls += len(calls)
        return [
            ToolCallPart(index, self._new_id(index), name, arguments)
            for index, (name, arguments) in enumerate(calls, first)
        ], ""

    def _read(self, body: str, captures: Mapping[str, str]) -> list[tuple[str, str]] | None:
        """Returns names and arguments of the calls in the text of a region; None if it can't be read."""
        try:
            spec = _of_one_region(self._format, captures)
            message = parse_response(body, spec, prefix="", tools=[*self._tools])
            found = message.get(CALLS) or []
            calls = [call["function"] for call in (found if isinstance(found, list) else [found])]
            return [(_as_json(str(call["name"])), _as_json(call["arguments"])) for call in calls]
        # A model may write anything. What isn't a call is content.
        except (ValueError, KeyError, TypeError, RecursionError):
            return None

    def _read_begun(self, body: str, captures: Mapping[str, str]) -> list[tuple[str, str]] | None:
        """Returns name and beginning of the arguments of a call that was cut; None without a name."""
        if "name" in captures:
            whole = self._read(body, captures)
            return [(captures["name"], whole[0][1].removesuffix("}"))] if whole else None
        name, arguments = _NAME.search(body), _ARGUMENTS.search(body)
        if name is None:
            return None
        return [(name[1], body[arguments.end() :] if arguments else "")]


class _Trimmed:
    """Leaves out white space at the start or the end of a text that arrives in pieces."""

    def __init__(self, *, at_start: bool = False, at_end: bool = False) -> None:
        """`at_start`, `at_end`: true to leave out the white space there."""
        self._skips, self._holds = at_start, at_end
        self._held = ""

    def add(self, text: str) -> str:
        """Returns the text that can be released; white space at the end is held until other text follows."""
        if self._skips:
            text = text.lstrip()
            self._skips = not text
        if not self._holds:
            return text
        whole = self._held + text
        released = whole.rstrip()
        self._held = whole[len(released) :]
        return released


def _as_json(arguments: Any) -> str:
    """Returns arguments as JSON text that can be encoded as UTF-8.

    Raises:
        ValueError: the arguments have a number that JSON can't express, or are half a surrogate pair.
    """
    if isinstance(arguments, str):
        arguments.encode()
        return arguments
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(arguments, allow_nan=False)
    return text


def _prefix(template: ResponseTemplate, prompt_end: str) -> str:
    """Returns the text of the prompt that belongs to the answer already."""
    if template.start_anchor_literals != [NO_ANCHOR] and template.start_anchor_re.search(prompt_end):
        return prompt_end
    return THINK if prompt_end.rstrip().endswith(THINK) else ""


def _divided(format: CallFormat, *, has_calls: bool) -> ResponseTemplate:
    """Returns the response template of a call format, changed so that the text of calls is not parsed."""
    fields: dict[str, Any] = {}
    for name, field in format.template["fields"].items():
        kept = {key: field[key] for key in _PLACES if key in field}
        if name == CALLS:
            if not has_calls:
                continue
            kept |= {"transform": {_BODY: "{content}", **{group: f"{{{group}}}" for group in _groups(field)}}}
        fields[name] = {**kept, "content": "text", "content_args": {"strip": False}}
    return load_response_template({**_anchors(format), "fields": fields})


def _of_one_region(format: CallFormat, captures: Mapping[str, str]) -> dict[str, Any]:
    """Returns a response template for the text of a single call region, without its beginning and end."""
    field = format.template["fields"][CALLS]
    kept = {key: value for key, value in field.items() if key not in _PLACES}
    if "transform" in kept:
        kept["transform"] = _filled(kept["transform"], captures)
    return {**_anchors(format), "fields": {CALLS: kept}}


def _filled(transform: Any, captures: Mapping[str, str]) -> Any:
    """Replaces the placeholders of captured groups in a transform by their text."""
    if isinstance(transform, Mapping):
        return {key: _filled(value, captures) for key, value in transform.items()}
    if isinstance(transform, str) and transform[1:-1] in captures and transform.startswith("{"):
        return captures[transform[1:-1]]
    return transform


def _groups(field: Mapping[str, Any]) -> list[str]:
    """Returns the names of the groups in the regular expressions that begin and end a field."""
    patterns = "".join(str(field.get(key, "")) for key in ("open_pattern", "close_pattern"))
    return re.findall(r"\(\?P<(\w+)>", patterns)


def _anchors(format: CallFormat) -> dict[str, Any]:
    return {name: value for name, value in format.template.items() if name.startswith("start_anchor")}
