"""The fields that chat completions and completions share, and their conversion to sampling parameters."""

import secrets
from typing import Annotated, Any, Self

from pydantic import (
    BeforeValidator,
    Field,
    StringConstraints,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from api.contract.fields import INTEGRAL, Only
from api.contract.sampling_fields import SamplingFields
from api.contract.strict import StrictModel, invalid, unsupported
from shared.messages import MAX_SALT_LENGTH, SamplingParams

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
SEED_BITS = 63

StopString = Annotated[str, StringConstraints(min_length=1)]


def _none_if_unlimited(value: Any) -> Any:
    return None if value == -1 else value


NumTokens = Annotated[
    Annotated[int, Field(ge=1, le=INT64_MAX), INTEGRAL] | None, BeforeValidator(_none_if_unlimited)
]


def _to_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Stop = Annotated[
    list[StopString],
    Field(max_length=4),
    BeforeValidator(_to_list),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {
                    "type": "array",
                    "items": {"type": "string", "minLength": 1},
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
    include_obfuscation: Annotated[bool | None, Only(False)] = None
    """Random padding of chunks, against observers of the network."""
    continuous_usage_stats: bool | None = None
    """With `include_usage`: adds the token counts so far to each chunk, as at vLLM."""

    @property
    def is_neutral(self) -> bool:
        """True if no option is set."""
        return not any(self.model_dump().values())


class GenerationFields(SamplingFields):
    """The fields that a chat completion and a completion share; null in a field means its default."""

    model: Annotated[str, StringConstraints(min_length=1)]
    """The base model or one of the adapters of `GET /v1/models`."""
    lora_path: str | None = None
    """Name of the adapter at SGLang: accepted if it is the same as `model`."""
    stream: bool | None = None
    """Sends the answer in pieces, as server-sent events that end with `data: [DONE]`. Default: false."""
    stream_options: StreamOptions | None = None
    """Only with `stream: true`."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """Randomness, 0 to 2; 0 always takes the most likely token. Default: 1."""
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Samples from the most likely tokens whose probabilities add up to this value. Default: 1."""
    top_k: Annotated[int, Field(ge=-1, le=INT64_MAX), INTEGRAL] | None = None
    """Samples from this number of most likely tokens. Default: 0, all tokens; -1 means the same."""
    max_tokens: NumTokens = None
    """Maximum number of tokens to generate."""
    min_tokens: Annotated[int, Field(ge=0, le=INT64_MAX), INTEGRAL] | None = None
    """Minimum number of tokens before an end-of-text token or stop string may end the answer. Default: 0."""
    min_new_tokens: Annotated[int, Field(ge=0, le=INT64_MAX), INTEGRAL] | None = None
    """Name of `min_tokens` at lmdeploy; without effect if both are given."""
    ignore_eos: bool | None = None
    """Continues after the model's end-of-text token. Default: false."""
    stop: Stop | None = None
    """Up to four strings that end the answer; the text stops in front of them. Special tokens count, too."""
    cache_salt: Annotated[str, StringConstraints(min_length=1, max_length=MAX_SALT_LENGTH)] | None = None
    """Shares the cache of prompts only with requests that have the same salt (and API key), as at vLLM."""
    seed: Annotated[int, Field(ge=INT64_MIN, le=INT64_MAX), INTEGRAL] | None = None
    """The same seed gives the same samples. Default: a random one for each request."""

    @field_validator("lora_path")
    @classmethod
    def _is_the_model(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and value != info.data.get("model", value):
            raise unsupported("name the adapter as model; only null or the same name is served here")
        return value

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Self:
        if self.stream_options is not None and not (self.stream or self.stream_options.is_neutral):
            raise invalid("only allowed when 'stream' is true", field="stream_options")
        name = "min_new_tokens" if self.min_tokens is None else "min_tokens"
        if self.min_output_tokens > (self.max_output_tokens or INT64_MAX):
            raise invalid("must not exceed the maximum number of tokens to generate", field=name)
        return self

    @property
    def max_output_tokens(self) -> int | None:
        """Maximum number of tokens to generate; None if only the context limits it."""
        return self.max_tokens

    @property
    def min_output_tokens(self) -> int:
        """Minimum number of tokens to generate, from `min_tokens` or `min_new_tokens`."""
        return (self.min_new_tokens if self.min_tokens is None else self.min_tokens) or 0

    @property
    def include_usage(self) -> bool:
        """True if a stream ends with the token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """True if each chunk of a stream has the token counts so far."""
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def to_sampling(self) -> SamplingParams:
        """Converts the fields to sampling parameters; draws a random seed if none is given."""
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
            min_tokens=self.min_output_tokens,
            ignore_eos=bool(self.ignore_eos),
            stop=tuple(self.stop or ()),
            logprobs=self.num_alternatives,
            **self.to_adjustments(),
        )
