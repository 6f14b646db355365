"""Builds the grammar that forces a model to answer with calls of tools."""

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from llguidance import LLMatcher

from shared.messages import ToolChoice
from worker.model.call_formats import CallSyntax

_SEPARATORS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""White space in the arguments: exactly as in the calls that chat templates show to models."""


def call_grammar(
    syntax: CallSyntax,
    tools: Iterable[Mapping[str, Any]],
    choice: ToolChoice,
    added_tokens: Mapping[int, str],
) -> str:
    """Returns a grammar of llguidance for one or more calls whose arguments fit the schemas of the tools.

    `added_tokens`: the tokens that a tokenizer finds before it divides the rest of a text, as texts by id. A
    grammar must name them by their ids, because llguidance does not take them for text.
    """
    functions = [tool["function"] for tool in tools]
    allowed = [one for one in functions if not choice.names or one["name"] in choice.names]
    first, between, last = (
        _terminals(text, added_tokens) for text in (syntax.first, syntax.between, syntax.last)
    )
    is_single = choice.is_single or not between
    lines = [
        f"start: {first} call {'' if is_single else f'({between} call)*'} {last}",
        "call: " + " | ".join(f"call{number}" for number in range(len(allowed))),
    ]
    for number, function in enumerate(allowed):
        before = syntax.name_after + json.dumps(function["name"]) + syntax.arguments_after
        lines += [
            f"call{number}: {json.dumps(before)} arguments{number} {json.dumps(syntax.end)}",
            f"arguments{number}: %json {json.dumps(_schema(function))}",
        ]
    return str(LLMatcher.grammar_from_lark("\n".join(lines)))


def calls_or(calls: str, answer: str) -> str:
    """Returns the grammar of an answer that follows either of two grammars: with calls, or without."""
    either = {"lark_grammar": "start: @calls | @answer"}
    parts = [either, _named("calls", calls), _named("answer", answer)]
    return json.dumps({"grammars": parts}, ensure_ascii=False)


def _named(name: str, grammar: str) -> dict[str, Any]:
    """Returns a grammar as a part of another one; llguidance serializes grammars as Lark or as JSON."""
    if not grammar.startswith("{"):
        return {"lark_grammar": grammar, "name": name}
    (part,) = json.loads(grammar)["grammars"]
    return {**part, "name": name}


def _schema(function: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the schema of a function's arguments: an object, which is empty if the function has none."""
    schema = function.get("parameters") or {"properties": {}, "additionalProperties": False}
    return {"type": "object", **schema, "x-guidance": _SEPARATORS}


def _terminals(text: str, added_tokens: Mapping[int, str]) -> str:
    """Returns a text as terminals of a grammar: strings, and added tokens by their ids."""
    parts: list[str] = []
    while text:
        found = _first_token(text, added_tokens)
        if found is None:
            parts.append(json.dumps(text))
            break
        start, token_id = found
        if start:
            parts.append(json.dumps(text[:start]))
        parts.append(f"<[{token_id}]>")
        text = text[start + len(added_tokens[token_id]) :]
    return " ".join(parts)


def _first_token(text: str, added_tokens: Mapping[int, str]) -> tuple[int, int] | None:
    found: Collection[tuple[int, int]] = [
        (text.find(token), token_id) for token_id, token in added_tokens.items() if token in text
    ]
    return min(found, default=None)
