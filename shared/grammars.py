"""Limits for the grammars of structured output, which the API and the workers share.

A request carries a grammar as text, in llguidance's own format. The API checks this text before the enqueue,
without a tokenizer. A worker compiles the text for the tokenizer of the requested model.
"""

from llguidance import LLMatcher, LLParserLimits

MAX_GRAMMAR_BYTES = 128 * 1024
"""Maximum size of a grammar; the check of one of this size takes about a second of a core."""


def parser_limits() -> LLParserLimits:
    """Returns the limits of llguidance, whose error messages then leave out the grammar itself."""
    return LLParserLimits(verbose_errors=False)


def fault_of(grammar: str) -> str | None:
    """Returns, in one line, why a grammar can't be used with any tokenizer; None if it can be used."""
    is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar, None, limits=parser_limits())
    return first_line(messages[0]) if is_error else None


def first_line(message: str) -> str:
    """Returns the first line of a message of llguidance; further lines repeat the grammar or a state."""
    line = next(iter(message.splitlines()), "").strip()
    return line[:300] or "unknown error"
