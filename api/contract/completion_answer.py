"""Completions as OpenAI's JSON: chunks of a stream, or one body."""

from collections.abc import Iterable
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from api.contract.answer import (
    FINISH_REASONS,
    Heading,
    PublicFinishReason,
    RunningUsage,
    UsageBody,
    to_usage_body,
)
from api.contract.server_events import DONE, on_one_line, render_data, render_id
from shared.messages import PositionLogprobs, StreamEvent, Usage


class TextLogprobs(msgspec.Struct, frozen=True):
    """Log probabilities of the tokens of a text; all lists have an entry per token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    """The most likely tokens at each position, the chosen one included, and their log probabilities."""
    text_offset: list[int]
    """The number of characters before each token."""


class TextChoice(msgspec.Struct, frozen=True):
    """One of the answers to a prompt, or the part of an answer that a chunk adds."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: PublicFinishReason | None = None


class Completion(msgspec.Struct, frozen=True):
    """The whole answer to a request that does not stream, or one chunk of a streamed answer."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: UsageBody | UnsetType | None = UNSET


class LogprobsWriter:
    """Converts the logprobs of one choice, event by event, and counts the characters of the tokens."""

    def __init__(self) -> None:
        self._num_chars = 0

    def convert(self, positions: Iterable[PositionLogprobs]) -> TextLogprobs:
        """Returns the logprobs of further tokens."""
        logprobs = TextLogprobs([], [], [], [])
        for position in positions:
            chosen = _name(position.chosen.token_bytes)
            logprobs.tokens.append(chosen)
            logprobs.token_logprobs.append(position.chosen.logprob)
            candidates = (*position.top, position.chosen)
            logprobs.top_logprobs.append({_name(token.token_bytes): token.logprob for token in candidates})
            logprobs.text_offset.append(self._num_chars)
            self._num_chars += len(chosen)
        return logprobs


def _body_logprobs(positions: list[PositionLogprobs]) -> TextLogprobs | None:
    return LogprobsWriter().convert(positions) if positions else None


def _name(token_bytes: bytes) -> str:
    """Returns a token's text; if this is no whole character, `bytes:` and the bytes in hexadecimal digits."""
    try:
        return token_bytes.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes)


def joined_logprobs(first: TextLogprobs | None, second: TextLogprobs) -> TextLogprobs:
    """Appends the logprobs of further tokens to the first ones, if there are any."""
    if first is None:
        return second
    first.tokens.extend(second.tokens)
    first.token_logprobs.extend(second.token_logprobs)
    first.top_logprobs.extend(second.top_logprobs)
    first.text_offset.extend(second.text_offset)
    return first


class TextChunkWriter:
    """Renders the `StreamEvent`s of one request as server-sent events."""

    is_stream = True

    def __init__(
        self,
        heading: Heading,
        *,
        include_usage: bool,
        continuous_usage: bool = False,
        with_ids: bool = False,
    ) -> None:
        """If `with_ids` is true, each event gets a line `id: <request id>:<event_no>`.

        With both `include_usage` and `continuous_usage`, each chunk has the token counts so far.
        """
        self._heading = heading
        self._include_usage = include_usage
        self._running = RunningUsage() if include_usage and continuous_usage else None
        self._with_ids = with_ids
        self._logprobs: dict[int, LogprobsWriter] = {}

    def render(self, event: StreamEvent) -> bytes:
        """Returns the chunks for one event, possibly none; usage and `[DONE]` are last."""
        if self._running is not None:
            self._running.add(event)
        parts = []
        if event.text or event.logprobs or event.finish_reason is not None:
            usage = self._running.to_body() if self._running else None
            parts.append(self._chunk([self._choice(event)], usage if self._include_usage else UNSET))
        if event.usage is not None:
            if self._include_usage:
                parts.append(self._chunk([], to_usage_body(event.usage)))
            parts.append(DONE)
        if parts and self._with_ids:
            # The id goes with the last part: a client that saw the id has seen the whole event.
            parts[-1] = render_id(self._heading.id, event.event_no) + parts[-1]
        return b"".join(parts)

    def _choice(self, event: StreamEvent) -> TextChoice:
        logprobs = None
        if event.logprobs:
            logprobs = self._logprobs.setdefault(event.index, LogprobsWriter()).convert(event.logprobs)
        reason = None if event.finish_reason is None else FINISH_REASONS[event.finish_reason]
        return TextChoice(event.index, event.text, logprobs, reason)

    def _chunk(self, choices: list[TextChoice], usage: UsageBody | UnsetType | None) -> bytes:
        heading = self._heading
        chunk = Completion(heading.id, "text_completion", heading.created, heading.model, choices, usage)
        return render_data(msgspec.json.encode(chunk))


class TextBodyWriter:
    """Collects the events of one request and writes them as one JSON object at the end."""

    is_stream = False

    def __init__(self, heading: Heading, num_choices: int) -> None:
        """Creates the writer of a request with `num_choices` choices, over all of its prompts."""
        self._heading = heading
        self._texts: list[list[str]] = [[] for _ in range(num_choices)]
        self._converters = [LogprobsWriter() for _ in range(num_choices)]
        self._logprobs: list[TextLogprobs | None] = [None] * num_choices
        self._finish_reasons: list[PublicFinishReason] = ["stop"] * num_choices

    def render(self, event: StreamEvent) -> bytes:
        """Returns the whole body for the last event, which has `usage`, and no bytes for earlier events."""
        self._texts[event.index].append(event.text)
        if event.logprobs:
            # Conversion at the end, of all tokens at once, would block other requests.
            part = self._converters[event.index].convert(event.logprobs)
            self._logprobs[event.index] = joined_logprobs(self._logprobs[event.index], part)
        if event.finish_reason is not None:
            self._finish_reasons[event.index] = FINISH_REASONS[event.finish_reason]
        return b"" if event.usage is None else self._body(event.usage)

    def _body(self, usage: Usage) -> bytes:
        heading = self._heading
        choices = [
            TextChoice(index, "".join(texts), logprobs, reason)
            for index, (texts, logprobs, reason) in enumerate(
                zip(self._texts, self._logprobs, self._finish_reasons, strict=True)
            )
        ]
        body = Completion(
            heading.id, "text_completion", heading.created, heading.model, choices, to_usage_body(usage)
        )
        return on_one_line(msgspec.json.encode(body))
