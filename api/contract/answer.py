"""The parts that all of OpenAI's answers share, and the port of the writers that put answers together."""

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
    """The share of the prompt's tokens that came from the prefix cache."""

    cached_tokens: int


class UsageBody(msgspec.Struct, frozen=True):
    """Token counts of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Heading(msgspec.Struct, frozen=True):
    """The fields that are the same in all chunks of an answer."""

    id: str
    created: int
    model: str


class AnswerWriter(Protocol):
    """Writes the events of one request as the body of its HTTP answer."""

    @property
    def is_stream(self) -> bool:
        """True if pieces are sent as they come; false if the body is sent as a whole at its end."""

    def render(self, event: StreamEvent) -> bytes:
        """The bytes that an event adds to the body, possibly none. Events without an error only."""


def to_usage_body(usage: Usage) -> UsageBody:
    """OpenAI's form of the token counts."""
    total = usage.prompt_tokens + usage.completion_tokens
    details = PromptTokensDetails(usage.cached_tokens)
    return UsageBody(usage.prompt_tokens, usage.completion_tokens, total, details)
