"""Fields that say how many sequences to generate, and from which distribution to sample their tokens."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from api.contract.fields import INTEGRAL
from api.contract.strict import BOUNDED, StrictModel, invalid
from shared.messages import INT32_MAX, MAX_NUM_CHOICES


def _check_token_id(written: str) -> str:
    if not re.fullmatch("0|[1-9][0-9]{0,9}", written) or int(written) > INT32_MAX:
        raise invalid('the keys must be token ids, such as "50256"')
    return written


Penalty = Annotated[float, Field(ge=-2, le=2)]
TokenIdText = Annotated[str, AfterValidator(_check_token_id)]
TokenIdNumber = Annotated[int, Field(ge=0, le=INT32_MAX), INTEGRAL]
Repetition = Annotated[float, Field(ge=0.01, le=100)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class SamplingFields(StrictModel):
    """Fields of all routes that generate text."""

    n: Annotated[int, Field(ge=1, le=MAX_NUM_CHOICES), INTEGRAL] | None = None
    """Number of answers to the prompt, 1 to 128; each is a choice with its own `index`. Default: 1."""
    logit_bias: Annotated[dict[TokenIdText, Bias], BOUNDED] | None = None
    """Numbers from -100 to 100 that are added to the logits of tokens, by token id; up to 1,000."""
    presence_penalty: Penalty | None = None
    """Number from -2 to 2 that is subtracted from the logits of tokens in the answer so far. Default: 0."""
    frequency_penalty: Penalty | None = None
    """Number from -2 to 2 that is subtracted for each occurrence of the token. Default: 0."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Samples only tokens at least this number times as likely as the likeliest, as at vLLM. Default: 0."""
    repetition_penalty: Repetition | None = None
    """Divides the positive logits of tokens of prompt and answer, as at vLLM; 0.01 to 100. Default: 1."""
    repeat_penalty: Repetition | None = None
    """Name of `repetition_penalty` at llama.cpp; without effect if both are given."""
    allowed_token_ids: Annotated[list[TokenIdNumber], BOUNDED] | None = None
    """The only tokens that may be generated, up to 1,000. Default: all, which [] means, too."""
    stop_token_ids: Annotated[list[TokenIdNumber], BOUNDED] | None = None
    """Token ids that end the answer besides the model's own, also with `ignore_eos`; up to 1,000."""
    include_stop_str_in_output: bool | None = None
    """Leaves the stop string, or the text of the stop token, at the end of the answer. Default: false."""

    @property
    def num_choices(self) -> int:
        """The number of answers to each prompt."""
        return self.n or 1

    @property
    def num_alternatives(self) -> int | None:
        """Number of alternatives to report for each token; None if no log probabilities are wanted."""
        return None

    def to_adjustments(self) -> dict[str, Any]:
        """Returns the fields of `SamplingParams` that these fields set, by name."""
        return {
            "logit_bias": {int(token_id): bias for token_id, bias in (self.logit_bias or {}).items()},
            "presence_penalty": self.presence_penalty or 0.0,
            "frequency_penalty": self.frequency_penalty or 0.0,
            "min_p": self.min_p or 0.0,
            "repetition_penalty": self.repetition_penalty or self.repeat_penalty or 1.0,
            "stop_token_ids": tuple(self.stop_token_ids or ()),
            "includes_stop": bool(self.include_stop_str_in_output),
            "allowed_token_ids": tuple(self.allowed_token_ids or ()),
        }
