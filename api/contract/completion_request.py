"""The body of `POST /v1/completions`."""

from typing import Annotated, Any, Self

import msgspec
from pydantic import Field, PlainValidator, WithJsonSchema, model_validator

from api.contract.extensions import ExtensionFields
from api.contract.fields import INTEGRAL, Only
from api.contract.form_fields import FormFields
from api.contract.generation_fields import INT64_MAX, GenerationFields
from api.contract.strict import invalid, unsupported
from api.contract.unserved import LabelFields
from shared.messages import INT32_MAX, MAX_NUM_PROMPTS, SamplingParams, TextOrTokens

DEFAULT_MAX_TOKENS = 16
MAX_ECHO_LENGTH = 1_000_000
"""Maximum number of characters, or of token ids, of all prompts that `echo` repeats in the answers."""
_TOKENS = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0, "maximum": INT32_MAX}}
_TEXT = {"type": "string"}


def _to_prompts(value: Any) -> tuple[TextOrTokens, ...]:
    """Returns the prompts in the field `prompt`, which has one or several texts or lists of token ids."""
    if isinstance(value, str) or _are_tokens(value):
        return (_to_prompt(value),)
    if not isinstance(value, list) or not value:
        raise invalid("must be a text, a list of texts, a list of token ids, or a list of such lists")
    if len(value) > MAX_NUM_PROMPTS:
        raise invalid(f"a request has at most {MAX_NUM_PROMPTS} prompts")
    if not all(isinstance(prompt, type(value[0])) for prompt in value):
        raise invalid("all prompts must be texts, or all of them lists of token ids")
    return tuple(map(_to_prompt, value))


def _to_prompt(value: Any) -> TextOrTokens:
    if isinstance(value, str):
        return value
    if not _are_tokens(value):
        raise invalid(f"token ids must be integers from 0 to {INT32_MAX}, at least one for each prompt")
    return tuple(value)


def _are_tokens(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(type(item) is int and 0 <= item <= INT32_MAX for item in value)
    )


Prompts = Annotated[
    tuple[TextOrTokens, ...],
    PlainValidator(_to_prompts),
    WithJsonSchema(
        {
            "anyOf": [
                _TEXT,
                {"type": "array", "minItems": 1, "maxItems": MAX_NUM_PROMPTS, "items": _TEXT},
                _TOKENS,
                {"type": "array", "minItems": 1, "maxItems": MAX_NUM_PROMPTS, "items": _TOKENS},
            ]
        }
    ),
]


class CompletionRequest(ExtensionFields, LabelFields, FormFields, GenerationFields):
    """The body of a completion request. Except in `model` and `prompt`, null stands for a field's default."""

    prompt: Prompts
    """A text, a list of texts, the token ids of one prompt, or a list of such lists."""
    max_tokens: Annotated[int, Field(ge=-1, le=INT64_MAX), INTEGRAL] | None = None
    """Maximum number of tokens to generate for each choice. Default: 16; -1 means no limit."""
    echo: bool | None = None
    """Puts the prompt in front of each answer. Default: false."""
    logprobs: Annotated[int, Field(ge=0, le=5), INTEGRAL] | None = None
    """Log probabilities of the tokens, with this number of alternatives to each, 0 to 5. Not with `echo`."""
    best_of: Annotated[int, Field(ge=1, le=20), INTEGRAL] | None = None
    """Number of answers of which the best `n` are sent. Served only if it equals `n`."""
    suffix: Annotated[str | None, Only("")] = None
    """Text after the answer, for models that fill a gap."""

    @model_validator(mode="after")
    def _is_served(self) -> Self:
        if self.max_tokens == 0:
            raise unsupported("at least one token is generated here", field="max_tokens")
        if self.best_of not in (None, self.num_choices):
            raise unsupported("only the value of 'n' is served here", field="best_of")
        if self.echo and self.logprobs is not None:
            raise unsupported("not served together with 'echo'", field="logprobs")
        size = sum(len(prompt) for prompt in self.prompt) * self.num_choices
        if self.echo and size > MAX_ECHO_LENGTH:
            raise invalid(f"prompts of more than {MAX_ECHO_LENGTH} characters are not repeated", field="echo")
        return self

    def to_sampling(self) -> SamplingParams:
        """Converts the fields to sampling parameters; see `GenerationFields`."""
        return msgspec.structs.replace(super().to_sampling(), logprobs=self.logprobs)

    @property
    def max_output_tokens(self) -> int | None:
        """Maximum number of tokens to generate; None if only the context limits it."""
        asked = DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        return None if asked == -1 else asked
