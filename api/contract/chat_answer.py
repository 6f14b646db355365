"""Events as OpenAI's JSON: chunks of a stream, or one body."""

from collections.abc import Iterable
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from shared.messages import StreamEvent, Usage

DONE = b"data: [DONE]\n\n"

PublicFinishReason = Literal["stop", "length", "tool_calls", "content_filter", "function_call"]


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """How the prompt's tokens came about."""

    cached_tokens: int


class UsageBody(msgspec.Struct, frozen=True):
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Delta(msgspec.Struct, frozen=True):
    """What a chunk adds to its message."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChunkChoice(msgspec.Struct, frozen=True):
    """The part of a chunk that belongs to one choice."""

    index: int
    delta: Delta
    logprobs: None = None
    finish_reason: PublicFinishReason | None = None


class ChatCompletionChunk(msgspec.Struct, frozen=True):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: UsageBody | UnsetType | None = UNSET


class AssistantMessage(msgspec.Struct, frozen=True):
    """The answer."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class Choice(msgspec.Struct, frozen=True):
    """One answer out of `n`."""

    index: int
    message: AssistantMessage
    logprobs: None
    finish_reason: PublicFinishReason


class ChatCompletion(msgspec.Struct, frozen=True):
    """The whole answer to a request that does not stream."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: UsageBody


class Heading(msgspec.Struct, frozen=True):
    """What is the same in all chunks of an answer."""

    id: str
    created: int
    model: str


FINISH_REASONS: dict[str, PublicFinishReason] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
}

_encode = msgspec.json.encode
_MARK = "text"
"""In place of a chunk's text."""
_LINE_SEPARATORS = tuple((char.encode(), b"\\u%04x" % ord(char)) for char in "\u0085\u2028\u2029")
"""Characters that end a line for `str.splitlines`, and their JSON escapes; the encoder escapes the others."""


def render_data(encoded: bytes) -> bytes:
    """A server-sent event of this JSON."""
    return b"data: %b\n\n" % _on_one_line(encoded)


def render_id(request_id: str, event_no: int) -> bytes:
    """The `id:` line of an event; it goes in front of the event's data."""
    return b"id: %b:%d\n" % (request_id.encode(), event_no)


def render_resumption(request_id: str, first_event_no: int) -> bytes:
    """The id that a resumed stream begins with: that of the last event before it.

    Clients keep it for events without an id of their own. If such a stream ended with an error at once, its
    reader would otherwise come back without an id, and get everything again.
    """
    return render_id(request_id, first_event_no - 1) if first_event_no else b""


def to_usage_body(usage: Usage) -> UsageBody:
    """OpenAI's form of the token counts."""
    total = usage.prompt_tokens + usage.completion_tokens
    details = PromptTokensDetails(usage.cached_tokens)
    return UsageBody(usage.prompt_tokens, usage.completion_tokens, total, details)


class ChunkWriter:
    """Renders the events of one request as server-sent events."""

    def __init__(
        self, heading: Heading, *, include_usage: bool, with_ids: bool = False, begun: Iterable[int] = ()
    ) -> None:
        """`with_ids`: events carry `id: <request id>:<event_no>`; `begun`: choices known to the client."""
        self._heading = heading
        self._include_usage = include_usage
        self._with_ids = with_ids
        self._begun = set(begun)
        self._frames: dict[int, tuple[bytes, bytes]] = {}

    def render(self, event: StreamEvent) -> bytes:
        """The chunks of one event, none when it releases no text: role first, usage and `[DONE]` last."""
        parts = []
        if event.index not in self._begun:
            self._begun.add(event.index)
            parts.append(self._chunk(event.index, Delta(role="assistant", content="")))
        if event.text:
            parts.append(self._text_chunk(event.index, event.text))
        if event.finish_reason is not None:
            parts.append(self._chunk(event.index, Delta(), FINISH_REASONS[event.finish_reason]))
        if event.usage is not None:
            if self._include_usage:
                parts.append(self._render([], to_usage_body(event.usage)))
            parts.append(DONE)
        if parts and self._with_ids:
            # On the last part: a client that saw the id has seen the whole event.
            parts[-1] = render_id(self._heading.id, event.event_no) + parts[-1]
        return b"".join(parts)

    def _text_chunk(self, index: int, text: str) -> bytes:
        """A chunk of text alone, which nearly all are: what stands around the text is encoded once."""
        frame = self._frames.get(index)
        if frame is None:
            before, _, after = self._chunk(index, Delta(content=_MARK)).rpartition(_encode(_MARK))
            frame = self._frames[index] = before, after
        return b"%b%b%b" % (frame[0], _on_one_line(_encode(text)), frame[1])

    def _chunk(self, index: int, delta: Delta, finish_reason: PublicFinishReason | None = None) -> bytes:
        choice = ChunkChoice(index, delta, None, finish_reason)
        return self._render([choice], None if self._include_usage else UNSET)

    def _render(self, choices: list[ChunkChoice], usage: UsageBody | UnsetType | None) -> bytes:
        heading = self._heading
        chunk = ChatCompletionChunk(
            heading.id, "chat.completion.chunk", heading.created, heading.model, choices, usage
        )
        return render_data(_encode(chunk))


class BodyWriter:
    """Collects the events of one request into one body."""

    def __init__(self, heading: Heading, num_choices: int) -> None:
        self._heading = heading
        self._texts: list[list[str]] = [[] for _ in range(num_choices)]
        self._finish_reasons: list[PublicFinishReason] = ["stop"] * num_choices

    def add(self, events: Iterable[StreamEvent]) -> None:
        """Takes the next events."""
        for event in events:
            self._texts[event.index].append(event.text)
            if event.finish_reason is not None:
                self._finish_reasons[event.index] = FINISH_REASONS[event.finish_reason]

    def render(self, usage: Usage) -> bytes:
        """The body of what was added."""
        heading = self._heading
        choices = [
            Choice(index, AssistantMessage("assistant", "".join(texts)), None, finish_reason)
            for index, (texts, finish_reason) in enumerate(
                zip(self._texts, self._finish_reasons, strict=True)
            )
        ]
        body = ChatCompletion(
            heading.id, "chat.completion", heading.created, heading.model, choices, to_usage_body(usage)
        )
        return _encode(body)


def _on_one_line(encoded: bytes) -> bytes:
    """JSON that is one line for clients too that split decoded text with `str.splitlines`, as httpx does."""
    if encoded.isascii():
        return encoded
    for separator, escape in _LINE_SEPARATORS:
        encoded = encoded.replace(separator, escape)
    return encoded
