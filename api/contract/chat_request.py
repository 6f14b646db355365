"""The body of `POST /v1/chat/completions`, and its conversion into sampling parameters."""

import secrets
from typing import Annotated, Any

from pydantic import BeforeValidator, FailFast, Field, StringConstraints, WithJsonSchema, model_validator

from api.contract.chat_messages import ChatMessage
from api.contract.strict import StrictModel, invalid, neutral
from api.contract.unserved import LabelFields, UnservedExtensions, UnservedOpenAIFields
from shared.messages import MAX_SALT_LENGTH, SamplingParams

MAX_NUM_MESSAGES = 10_000
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
SEED_BITS = 63

StopString = Annotated[str, StringConstraints(min_length=1)]


def _to_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Stop = Annotated[
    list[StopString],
    Field(min_length=1, max_length=4),
    BeforeValidator(_to_list),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {
                    "type": "array",
                    "items": {"type": "string", "minLength": 1},
                    "minItems": 1,
                    "maxItems": 4,
                },
            ]
        }
    ),
]


class StreamOptions(StrictModel):
    """Options of a stream."""

    include_usage: bool | None = None
    """Adds one last chunk with the token counts."""
    include_obfuscation: Annotated[bool | None, neutral(False)] = None
    """Only false is served."""


class ServedFields(StrictModel):
    """The fields of a chat completion that Lorelay serves.

    `/v1/completions` has most of them, but not `messages`: for its request class, the fields that both
    endpoints have must move to a base class in a separate module.
    """

    model: Annotated[str, StringConstraints(min_length=1)]
    """The base model or one of the adapters of `GET /v1/models`."""
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_NUM_MESSAGES), FailFast()]
    """The conversation so far, oldest message first."""
    stream: bool | None = None
    """Sends the answer in pieces, as server-sent events that end with `data: [DONE]`. Default: false."""
    stream_options: StreamOptions | None = None
    """Only with `stream: true`."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """Randomness, 0 to 2; 0 always takes the most likely token. Default: 1."""
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Samples from the most likely tokens whose probabilities add up to this value. Default: 1."""
    top_k: Annotated[int, Field(ge=-1, le=INT64_MAX)] | None = None
    """Samples from this number of most likely tokens. Default: 0, all tokens; -1 means the same."""
    max_completion_tokens: Annotated[int, Field(ge=1, le=INT64_MAX)] | None = None
    """Maximum number of tokens to generate. Default: up to the model's context length."""
    max_tokens: Annotated[int, Field(ge=1, le=INT64_MAX)] | None = None
    """Older name of `max_completion_tokens`, which takes precedence if both are given."""
    min_tokens: Annotated[int, Field(ge=0, le=INT64_MAX)] | None = None
    """Minimum number of tokens before an end-of-text token or stop string may end the answer. Default: 0."""
    ignore_eos: bool | None = None
    """Continues after the model's end-of-text token. Default: false."""
    stop: Stop | None = None
    """One to four strings that end the answer; the text stops in front of them. Special tokens count, too."""
    cache_salt: Annotated[str, StringConstraints(min_length=1, max_length=MAX_SALT_LENGTH)] | None = None
    """Shares the cache of prompts only with requests that have the same salt (and API key), as at vLLM."""
    seed: Annotated[int, Field(ge=INT64_MIN, le=INT64_MAX)] | None = None
    """The same seed gives the same samples. Default: a random one for each request."""


class ChatCompletionRequest(UnservedExtensions, UnservedOpenAIFields, LabelFields, ServedFields):
    """The body of a chat completion request; null in a field means its default."""

    @model_validator(mode="after")
    def _fields_fit_together(self) -> "ChatCompletionRequest":
        if self.stream_options is not None and not self.stream:
            raise invalid("only allowed when 'stream' is true", field="stream_options")
        if self.min_tokens and self.max_output_tokens and self.min_tokens > self.max_output_tokens:
            raise invalid("must not exceed the maximum number of tokens to generate", field="min_tokens")
        return self

    @property
    def max_output_tokens(self) -> int | None:
        """Maximum number of tokens to generate, from `max_completion_tokens` or `max_tokens`."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def include_usage(self) -> bool:
        """True if a stream ends with the token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def to_sampling(self) -> SamplingParams:
        """Converts the body to sampling parameters for the workers; draws a random seed if none is given."""
        top_p = 1.0 if self.top_p is None else self.top_p
        top_k = max(self.top_k or 0, 0)
        if top_p == 0:  # means the most likely token, as at OpenAI; a nucleus of probability 0 would be empty
            top_p, top_k = 1.0, 1
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=top_p,
            top_k=top_k,
            seed=secrets.randbits(SEED_BITS) if self.seed is None else self.seed % 2**SEED_BITS,
            max_tokens=self.max_output_tokens,
            min_tokens=self.min_tokens or 0,
            ignore_eos=bool(self.ignore_eos),
            stop=tuple(self.stop or ()),
        )
