"""Checks that the regular expressions in an adapter's config don't backtrack without end."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from worker.model.marked_template import LimitExceeded

_LAYER_FIELDS = ("target_modules", "exclude_modules", "layers_pattern")
_PATTERN_FIELDS = ("rank_pattern", "alpha_pattern")
_PLAIN = re.compile(r"[\w.-]*")


class PatternProblem(Exception):
    """A regular expression takes too long. The message has the expression and its field."""


class Patterns(Protocol):
    """Matches regular expressions within a time limit; implemented by `LimitedProcess`."""

    def match(self, pattern: str, names: Sequence[str]) -> None:
        """Matches a pattern against names, as PEFT does. Raises `LimitExceeded` if this takes too long."""


def check_patterns(config: Mapping[str, Any], names: Sequence[str], patterns: Patterns | None) -> None:
    """Matches the patterns of a config against a model's modules; None matches nothing.

    Raises:
        PatternProblem: a pattern takes too long.
    """
    for field, pattern in _patterns_in(config):
        if patterns is None or _PLAIN.fullmatch(pattern):
            continue
        try:
            patterns.match(pattern, names)
        except LimitExceeded as error:
            raise PatternProblem(f"its {field} {pattern[:200]!r} can't be used: {error}") from error


def _patterns_in(config: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for field in _LAYER_FIELDS:
        value = config.get(field)
        # PEFT takes a list of targets for names, but a list of layer patterns for patterns.
        entries = value if isinstance(value, list) and field == "layers_pattern" else [value]
        yield from ((field, entry) for entry in entries if isinstance(entry, str))
    for field in _PATTERN_FIELDS:
        value = config.get(field)
        yield from ((field, name) for name in (value if isinstance(value, dict) else ()))
