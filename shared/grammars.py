"""Limits for the grammars of structured output, which the API and the workers share.

A request carries a grammar as text, in llguidance's own format. The API checks this text before the enqueue,
without a tokenizer. A worker compiles the text for the tokenizer of the requested model.
"""

import json

from llguidance import LLMatcher, LLParserLimits

MAX_GRAMMAR_BYTES = 128 * 1024
"""Maximum size of a grammar; the check of one of this size takes about a second of a core."""
MAX_NUM_REFERENCES = 500
"""Maximum number of `$ref`s: llguidance follows them recursively, and 2,500 in a chain overflow its stack."""
MAX_NUM_RULES = 1_000
"""Maximum number of lines of a grammar in Lark, for the same reason."""
MAX_LEXER_FUEL = 300_000
"""Maximum effort for the regular expressions of a grammar, in llguidance's unit: about 0.3 s of a core."""


def parser_limits() -> LLParserLimits:
    """Returns the limits of llguidance, whose error messages then leave out the grammar itself."""
    return LLParserLimits(initial_lexer_fuel=MAX_LEXER_FUEL, verbose_errors=False)


def fault_of(grammar: str) -> str | None:
    """Returns, in one line, why a grammar can't be used with any tokenizer; None if it can be used."""
    if excess := excess_of(grammar):
        return excess
    is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar, None, limits=parser_limits())
    return reason_in(messages[0]) if is_error else None


def excess_of(grammar: str) -> str | None:
    """Returns the limit that a grammar exceeds; llguidance would end the process for it, without an error."""
    if grammar.count("$ref") > MAX_NUM_REFERENCES:
        return f"more than {MAX_NUM_REFERENCES} references ($ref)"
    parts = json.loads(grammar).get("grammars", ()) if grammar.startswith("{") else ()
    texts = [part.get("lark_grammar") or "" for part in parts] or [grammar]
    if any(text.count("\n") >= MAX_NUM_RULES for text in texts):
        return f"more than {MAX_NUM_RULES} lines"
    return None


def reason_in(message: str) -> str:
    """Returns the reason in an error message of llguidance, without the lines that repeat the grammar."""
    lines = [line.strip() for line in message.splitlines()] or [""]
    # A message about a regular expression ends with a line of its own for the reason.
    reasons = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return " ".join(part[:300] for part in (lines[0], *reasons)) or "unknown error"
