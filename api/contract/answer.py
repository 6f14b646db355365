"""JSON parts that all of OpenAI's answers share, and `AnswerWriter`, the port that renders answers."""

from typing import Literal, Protocol

import msgspec

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


class UsageBody(msgspec.Struct, frozen=True):
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


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


def to_usage_body(usage: Usage) -> UsageBody:
    """Returns the token counts in OpenAI's format."""
    total = usage.prompt_tokens + usage.completion_tokens
    details = PromptTokensDetails(usage.cached_tokens)
    return UsageBody(usage.prompt_tokens, usage.completion_tokens, total, details)
