"""The body of `POST /v1/chat/completions`."""

from typing import Annotated, Literal, Self

from pydantic import FailFast, Field, model_validator

from api.contract.chat_messages import ChatMessage
from api.contract.extensions import ExtensionFields
from api.contract.fields import INTEGRAL
from api.contract.form_fields import FormFields
from api.contract.generation_fields import GenerationFields, NumTokens
from api.contract.strict import invalid, unsupported
from api.contract.template_variables import TemplateVariables
from api.contract.tool_fields import ToolFields
from api.contract.unserved import LabelFields, UnservedOpenAIFields
from shared.messages import MAX_NUM_LOGPROBS, NO_INPUTS, TemplateInputs

MAX_NUM_MESSAGES = 10_000

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class ServedFields(GenerationFields):
    """The fields of a chat completion that Lorelay serves, except the inputs of the chat template."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_NUM_MESSAGES), FailFast()]
    """The conversation so far, oldest message first."""
    max_completion_tokens: NumTokens = None
    """Maximum number of tokens to generate. Default: up to the model's context length; -1 means the same."""
    max_tokens: NumTokens = None
    """Older name of `max_completion_tokens`, which takes precedence if both are given."""
    logprobs: bool | None = None
    """Reports the log probability of each token of the answer, by the model's own distribution."""
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_NUM_LOGPROBS), INTEGRAL] | None = None
    """Number of most likely tokens to report at each position, 0 to 20. Only with `logprobs: true`."""

    @model_validator(mode="after")
    def _alternatives_have_a_token(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise invalid("only allowed when 'logprobs' is true", field="top_logprobs")
        return self

    @property
    def num_alternatives(self) -> int | None:
        """Number of alternatives to report for each token; None if no log probabilities are wanted."""
        return (self.top_logprobs or 0) if self.logprobs else None


class TemplateFields(ToolFields):
    """Fields that the chat template gets besides the messages."""

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

    @model_validator(mode="after")
    def _continues_or_answers(self) -> Self:
        if self.add_generation_prompt is False and not self.continue_final_message:
            raise unsupported("only true is served here", field="add_generation_prompt")
        if self.add_generation_prompt and self.continue_final_message:
            raise invalid("not together with 'add_generation_prompt'", field="continue_final_message")
        return self

    def to_template_inputs(self) -> TemplateInputs:
        """Returns the inputs of the chat template besides the messages."""
        tools = self.described
        hints = {"reasoning_effort": self.reasoning_effort, "enable_thinking": self.enable_thinking}
        given = {**hints, **(self.chat_template_kwargs or {})}
        variables = {name: value for name, value in given.items() if value is not None}
        if not (tools or variables or self.continue_final_message):
            return NO_INPUTS
        return TemplateInputs(tools, variables, bool(self.continue_final_message))


class UsualChatRequest(UnservedOpenAIFields, LabelFields, TemplateFields, FormFields, ServedFields):
    """The body of a chat completion request without fields that only other servers have.

    Pydantic takes 0.3 µs for each field of a model that a body lacks, and other servers have 150 fields.
    """

    @model_validator(mode="after")
    def _continues_a_text(self) -> Self:
        last = self.messages[-1]
        if self.continue_final_message and (last.role != "assistant" or last.has_calls or not last.text):
            raise invalid("the last message must be a text of the assistant", field="continue_final_message")
        return self

    @property
    def max_output_tokens(self) -> int | None:
        """Maximum number of tokens to generate, from `max_completion_tokens` or `max_tokens`."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class ChatCompletionRequest(ExtensionFields, UsualChatRequest):
    """The body of a chat completion request; a field with the value null gets its default."""
