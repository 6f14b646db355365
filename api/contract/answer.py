"""JSON parts that all of OpenAI's answers share, and `AnswerWriter`, the port that renders answers."""

from typing import Literal, Protocol

import msgspec
from msgspec import UNSET, UnsetType

from shared.messages import StreamEvent, Usage

PublicFinishReason = Literal["stop", "length", "tool_calls", "content_filter", "function_call"]

FINISH_REASONS: dict[str, PublicFinishReason] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
}


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """The number of prompt tokens that came from the prefix cache."""

    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    """The number of completion tokens that belong to the model's reasoning."""

    reasoning_tokens: int


class UsageBody(msgspec.Struct, frozen=True):
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET


class Heading(msgspec.Struct, frozen=True):
    """The fields that have the same values in all chunks of an answer."""

    id: str
    created: int
    model: str


class AnswerWriter(Protocol):
    """Writes the events of one request as the body of its HTTP answer."""

    @property
    def is_stream(self) -> bool:
        """True if each event is sent as it arrives; False if the body is sent as a whole at the end."""

    def render(self, event: StreamEvent) -> bytes:
        """Returns the bytes that an event adds to the body, possibly none; the event must have no error."""


def to_usage_body(usage: Usage, reasoning_tokens: int = 0) -> UsageBody:
    """Returns the token counts in OpenAI's format."""
    total = usage.prompt_tokens + usage.completion_tokens
    details = PromptTokensDetails(usage.cached_tokens)
    reasoning = CompletionTokensDetails(reasoning_tokens) if reasoning_tokens else UNSET
    return UsageBody(usage.prompt_tokens, usage.completion_tokens, total, details, reasoning)


class RunningUsage:
    """Counts the tokens of a request, event by event, for clients that get the counts in each chunk."""

    def __init__(self) -> None:
        self._at_first: Usage | None = None
        self._num_tokens = 0

    def add(self, event: StreamEvent) -> None:
        """Counts the tokens of an event."""
        self._num_tokens += len(event.token_ids)
        self._at_first = self._at_first or event.usage_so_far or event.usage

    def to_body(self) -> UsageBody | None:
        """Returns the counts so far; None if the worker is of an earlier release, which reports none."""
        first = self._at_first
        if first is None:
            return None
        return to_usage_body(Usage(first.prompt_tokens, self._num_tokens, first.cached_tokens))
