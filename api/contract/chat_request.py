"""The body of `POST /v1/chat/completions`, and its conversion into sampling parameters."""

import secrets
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    FailFast,
    Field,
    StringConstraints,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from api.contract.chat_messages import ChatMessage
from api.contract.chat_tools import FunctionDefinition, Tool
from api.contract.extensions import ExtensionFields
from api.contract.fields import INTEGRAL, Only
from api.contract.strict import BOUNDED, StrictModel, invalid, unsupported
from api.contract.template_variables import TemplateVariables
from api.contract.unserved import LabelFields, Object, UnservedOpenAIFields
from shared.messages import MAX_SALT_LENGTH, NO_INPUTS, SamplingParams, TemplateInputs

MAX_NUM_MESSAGES = 10_000
MAX_NUM_TOOLS = 128
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
SEED_BITS = 63

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
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


class ServedFields(StrictModel):
    """The fields of a chat completion that Lorelay serves.

    `/v1/completions` has most of them, but not `messages`: for its request class, the fields that both
    endpoints have must move to a base class in a separate module.
    """

    model: Annotated[str, StringConstraints(min_length=1)]
    """The base model or one of the adapters of `GET /v1/models`."""
    lora_path: str | None = None
    """Name of the adapter at SGLang: accepted if it is the same as `model`."""
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
    top_k: Annotated[int, Field(ge=-1, le=INT64_MAX), INTEGRAL] | None = None
    """Samples from this number of most likely tokens. Default: 0, all tokens; -1 means the same."""
    max_completion_tokens: NumTokens = None
    """Maximum number of tokens to generate. Default: up to the model's context length; -1 means the same."""
    max_tokens: NumTokens = None
    """Older name of `max_completion_tokens`, which takes precedence if both are given."""
    min_tokens: Annotated[int, Field(ge=0, le=INT64_MAX), INTEGRAL] | None = None
    """Minimum number of tokens before an end-of-text token or stop string may end the answer. Default: 0."""
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


class TemplateFields(StrictModel):
    """Fields that the chat template gets besides the messages."""

    tool_choice: Annotated[str | Object | None, Only("none", "auto")] = None
    """Choice of tools that the model calls. No model does so here: with `tools`, it must be `none`."""
    tools: Annotated[list[Tool], Field(max_length=MAX_NUM_TOOLS), BOUNDED] | None = None
    """Functions that the chat template describes to the model. Only with `tool_choice: "none"`."""
    function_call: Annotated[str | Object | None, Only("none", "auto")] = None
    """Older name of `tool_choice`."""
    functions: Annotated[list[FunctionDefinition], Field(max_length=MAX_NUM_TOOLS), BOUNDED] | None = None
    """Older form of `tools`. Only with `function_call: "none"`."""
    reasoning_effort: Effort | None = None
    """Hint for templates that know it; others ignore it."""
    chat_template_kwargs: TemplateVariables | None = None
    """Variables for the chat template, such as `enable_thinking`; it ignores names that it doesn't know."""
    enable_thinking: bool | None = None
    """Short for this variable in `chat_template_kwargs`, which takes precedence."""
    add_generation_prompt: bool | None = None
    """True, or false with `continue_final_message`. Refused otherwise."""
    continue_final_message: bool | None = None
    """Continues the last message, which must be the assistant's, in place of a new one. Default: false."""

    @field_validator("tools", "functions", mode="before")
    @classmethod
    def _are_not_called(cls, value: Any, info: ValidationInfo) -> Any:
        choice = "tool_choice" if info.field_name == "tools" else "function_call"
        if value and info.data.get(choice, "none") != "none":
            raise unsupported(f'only [] is served here, or tools that are not called: add "{choice}": "none"')
        return value

    @model_validator(mode="after")
    def _continues_or_answers(self) -> Self:
        if self.tools and self.functions:
            raise invalid("'tools' are given already", field="functions")
        if self.add_generation_prompt is False and not self.continue_final_message:
            raise unsupported("only true is served here", field="add_generation_prompt")
        if self.add_generation_prompt and self.continue_final_message:
            raise invalid("not together with 'add_generation_prompt'", field="continue_final_message")
        return self

    def to_template_inputs(self) -> TemplateInputs:
        """Returns the inputs of the chat template besides the messages."""
        tools = [tool.function.to_template() for tool in self.tools or ()]
        tools += [function.to_template() for function in self.functions or ()]
        hints = {"reasoning_effort": self.reasoning_effort, "enable_thinking": self.enable_thinking}
        given = {**hints, **(self.chat_template_kwargs or {})}
        variables = {name: value for name, value in given.items() if value is not None}
        if not (tools or variables or self.continue_final_message):
            return NO_INPUTS
        return TemplateInputs(tools, variables, bool(self.continue_final_message))


class ChatCompletionRequest(ExtensionFields, UnservedOpenAIFields, LabelFields, TemplateFields, ServedFields):
    """The body of a chat completion request; null in a field means its default."""

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Self:
        if self.stream_options is not None and not (self.stream or self.stream_options.is_neutral):
            raise invalid("only allowed when 'stream' is true", field="stream_options")
        if self.min_tokens and self.max_output_tokens and self.min_tokens > self.max_output_tokens:
            raise invalid("must not exceed the maximum number of tokens to generate", field="min_tokens")
        last = self.messages[-1]
        if self.continue_final_message and (last.role != "assistant" or last.has_calls or not last.text):
            raise invalid("the last message must be a text of the assistant", field="continue_final_message")
        return self

    @property
    def max_output_tokens(self) -> int | None:
        """Maximum number of tokens to generate, from `max_completion_tokens` or `max_tokens`."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def include_usage(self) -> bool:
        """True if a stream ends with the token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """True if each chunk of a stream has the token counts so far."""
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

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
