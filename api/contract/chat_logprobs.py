"""Log probabilities in the format of OpenAI's chat completions."""

from collections.abc import Iterable
from typing import cast

import msgspec

from shared.messages import PositionLogprobs, TokenLogprob


class AlternativeToken(msgspec.Struct, frozen=True):
    """One of the most likely tokens at a position."""

    token: str
    """The token's text; bytes that are no whole character are replaced by U+FFFD."""
    logprob: float
    bytes: list[int]


class ChosenToken(msgspec.Struct, frozen=True):
    """The token of the answer at a position, and the most likely tokens at this position."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[AlternativeToken]


class ChoiceLogprobs(msgspec.Struct, frozen=True):
    """The log probabilities of the tokens of one choice, or of a part of the choice."""

    content: list[ChosenToken]
    refusal: None = None


def to_choice_logprobs(positions: Iterable[PositionLogprobs]) -> ChoiceLogprobs:
    """Returns the log probabilities of an event in OpenAI's format."""
    return ChoiceLogprobs([_chosen(position) for position in positions])


def encode_positions(positions: Iterable[PositionLogprobs]) -> list[msgspec.Raw]:
    """Returns the JSON of each position, because encoding all positions at the end would take long."""
    return [msgspec.Raw(msgspec.json.encode(_chosen(position))) for position in positions]


def join_positions(encoded: list[msgspec.Raw]) -> ChoiceLogprobs:
    """Returns the log probabilities of a choice, from the results of `encode_positions`."""
    # msgspec writes each `Raw` as it is, in place of the struct from which it was encoded.
    return ChoiceLogprobs(cast(list[ChosenToken], encoded))


def _chosen(position: PositionLogprobs) -> ChosenToken:
    chosen = position.chosen
    top = [AlternativeToken(_text(one), one.logprob, list(one.token_bytes)) for one in position.top]
    return ChosenToken(_text(chosen), chosen.logprob, list(chosen.token_bytes), top)


def _text(token: TokenLogprob) -> str:
    return token.token_bytes.decode(errors="replace")
