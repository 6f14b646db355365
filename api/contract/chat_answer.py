"""Chat completions as OpenAI's JSON: chunks of a stream, or one body."""

from collections.abc import Iterable, Iterator
from typing import Literal

import msgspec
from msgspec import UNSET, Raw, UnsetType

from api.contract.answer import (
    FINISH_REASONS,
    Heading,
    PublicFinishReason,
    RunningUsage,
    UsageBody,
    to_usage_body,
)
from api.contract.chat_calls import (
    Call,
    CallPart,
    Function,
    FunctionPart,
    joined_calls,
    to_call_part,
    to_function_part,
)
from api.contract.chat_logprobs import (
    ChoiceLogprobs,
    encode_positions,
    join_positions,
    to_choice_logprobs,
)
from api.contract.server_events import DONE, on_one_line, render_data, render_id
from shared.messages import FinishReason, StreamEvent, ToolCallPart


class Delta(msgspec.Struct, frozen=True):
    """The part of a message that one chunk adds."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[CallPart] | UnsetType = UNSET
    function_call: FunctionPart | UnsetType = UNSET


class ChunkChoice(msgspec.Struct, frozen=True):
    """The part of a chunk that belongs to one choice."""

    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: PublicFinishReason | None = None


class ChatCompletionChunk(msgspec.Struct, frozen=True):
    """One chunk of a streamed answer."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: UsageBody | UnsetType | None = UNSET


class AssistantMessage(msgspec.Struct, frozen=True):
    """The message that the model generated."""

    role: Literal["assistant"]
    content: str | None
    """None if the model only called tools."""
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[Call] | UnsetType = UNSET
    function_call: Function | UnsetType = UNSET


class Choice(msgspec.Struct, frozen=True):
    """One of the `n` generated messages, and the reason why it ended."""

    index: int
    message: AssistantMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: PublicFinishReason


class ChatCompletion(msgspec.Struct, frozen=True):
    """The whole answer to a request that does not stream."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: UsageBody


def finish_reason_of(event: StreamEvent, has_legacy_calls: bool) -> PublicFinishReason:
    """Returns the reason why a choice ended, in OpenAI's words; the event must have one."""
    reason = FINISH_REASONS[event.finish_reason or FinishReason.STOP]
    return "function_call" if has_legacy_calls and reason == "tool_calls" else reason


_encode = msgspec.json.encode
_MARK = "text"
"""Placeholder for the text of a chunk; the encoded chunk is split at the placeholder."""


class ChunkWriter:
    """Renders the `StreamEvent`s of one request as server-sent events."""

    is_stream = True

    def __init__(
        self,
        heading: Heading,
        *,
        include_usage: bool,
        continuous_usage: bool = False,
        with_ids: bool = False,
        has_legacy_calls: bool = False,
        begun: Iterable[int] = (),
    ) -> None:
        """`begun` lists the choices of which the client has already received the role (the first chunk).

        `has_legacy_calls`: true if the client expects `function_call` in place of `tool_calls`.

        If `with_ids` is true, each event gets a line `id: <request id>:<event_no>`. With both `include_usage`
        and `continuous_usage`, each chunk has the token counts so far.
        """
        self._heading = heading
        self._include_usage = include_usage
        self._running = RunningUsage() if include_usage and continuous_usage else None
        self._with_ids = with_ids
        self._has_legacy_calls = has_legacy_calls
        self._begun = set(begun)
        self._frames: dict[int, tuple[bytes, bytes]] = {}

    def render(self, event: StreamEvent) -> bytes:
        """Returns the chunks for one event, possibly none: the role is first, usage and `[DONE]` are last."""
        parts = []
        if self._running is not None:
            self._running.add(event)
        if event.index not in self._begun:
            self._begun.add(event.index)
            parts.append(self._chunk(event.index, Delta(role="assistant", content="")))
        if event.logprobs:
            # Text may be held back for a later chunk. The tokens of this event have log probabilities anyway.
            logprobs = to_choice_logprobs(event.logprobs)
            parts.append(self._chunk(event.index, Delta(content=event.text), logprobs=logprobs))
        elif event.text:
            parts.append(self._text_chunk(event.index, event.text))
        if event.reasoning or event.tool_calls:
            parts += [self._chunk(event.index, delta) for delta in self._deltas(event)]
        if event.finish_reason is not None:
            reason = finish_reason_of(event, self._has_legacy_calls)
            parts.append(self._chunk(event.index, Delta(), reason))
        if event.usage is not None:
            if self._include_usage:
                parts.append(self._render([], to_usage_body(event.usage, event.reasoning_tokens)))
            parts.append(DONE)
        if parts and self._with_ids:
            # The id goes with the last part: a client that saw the id has seen the whole event.
            parts[-1] = render_id(self._heading.id, event.event_no) + parts[-1]
        return b"".join(parts)

    def _deltas(self, event: StreamEvent) -> Iterator[Delta]:
        if event.reasoning:
            yield Delta(reasoning_content=event.reasoning)
        for part in event.tool_calls:
            if self._has_legacy_calls:
                yield Delta(function_call=to_function_part(part))
            else:
                yield Delta(tool_calls=[to_call_part(part)])

    def _text_chunk(self, index: int, text: str) -> bytes:
        """Renders a chunk that has only text. The JSON around the text is encoded once per choice."""
        if self._running is not None:
            return self._chunk(index, Delta(content=text))
        frame = self._frames.get(index)
        if frame is None:
            before, _, after = self._chunk(index, Delta(content=_MARK)).rpartition(_encode(_MARK))
            frame = self._frames[index] = before, after
        return b"%b%b%b" % (frame[0], on_one_line(_encode(text)), frame[1])

    def _chunk(
        self,
        index: int,
        delta: Delta,
        finish_reason: PublicFinishReason | None = None,
        logprobs: ChoiceLogprobs | None = None,
    ) -> bytes:
        choice = ChunkChoice(index, delta, logprobs, finish_reason)
        if not self._include_usage:
            return self._render([choice], UNSET)
        return self._render([choice], None if self._running is None else self._running.to_body())

    def _render(self, choices: list[ChunkChoice], usage: UsageBody | UnsetType | None) -> bytes:
        heading = self._heading
        chunk = ChatCompletionChunk(
            heading.id, "chat.completion.chunk", heading.created, heading.model, choices, usage
        )
        return render_data(_encode(chunk))


class BodyWriter:
    """Collects the events of one request and writes them as one JSON object at the end."""

    is_stream = False

    def __init__(
        self,
        heading: Heading,
        num_choices: int,
        *,
        has_logprobs: bool = False,
        has_legacy_calls: bool = False,
    ) -> None:
        """`has_logprobs`: true if the client asked for log probabilities.

        `has_legacy_calls`: true if the client expects `function_call` in place of `tool_calls`.
        """
        self._heading = heading
        self._has_logprobs = has_logprobs
        self._has_legacy_calls = has_legacy_calls
        self._reasoning: list[list[str]] = [[] for _ in range(num_choices)]
        self._calls: list[list[ToolCallPart]] = [[] for _ in range(num_choices)]
        self._positions: list[list[Raw]] = [[] for _ in range(num_choices)]
        self._texts: list[list[str]] = [[] for _ in range(num_choices)]
        self._finish_reasons: list[PublicFinishReason] = ["stop"] * num_choices

    def render(self, event: StreamEvent) -> bytes:
        """Returns the whole body for the last event, which has `usage`, and no bytes for earlier events."""
        self._texts[event.index].append(event.text)
        if event.reasoning or event.tool_calls:
            self._reasoning[event.index].append(event.reasoning)
            self._calls[event.index] += event.tool_calls
        if event.logprobs:
            self._positions[event.index] += encode_positions(event.logprobs)
        if event.finish_reason is not None:
            self._finish_reasons[event.index] = finish_reason_of(event, self._has_legacy_calls)
        if event.usage is None:
            return b""
        return self._body(to_usage_body(event.usage, event.reasoning_tokens))

    def _message(self, index: int) -> AssistantMessage:
        text, reasoning = "".join(self._texts[index]), "".join(self._reasoning[index])
        calls = joined_calls(self._calls[index])
        is_legacy = self._has_legacy_calls
        return AssistantMessage(
            "assistant",
            text if text or not calls else None,
            None,
            reasoning or UNSET,
            calls if calls and not is_legacy else UNSET,
            calls[0].function if calls and is_legacy else UNSET,
        )

    def _body(self, usage: UsageBody) -> bytes:
        heading = self._heading
        choices = [
            Choice(
                index,
                self._message(index),
                join_positions(positions) if self._has_logprobs else None,
                finish_reason,
            )
            for index, (positions, finish_reason) in enumerate(
                zip(self._positions, self._finish_reasons, strict=True)
            )
        ]
        body = ChatCompletion(heading.id, "chat.completion", heading.created, heading.model, choices, usage)
        return on_one_line(_encode(body))
