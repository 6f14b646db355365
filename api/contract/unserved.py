"""Fields of a chat completion that OpenAI, lmdeploy or vLLM have and that Lorelay refuses or ignores.

A refused field is accepted with its neutral value, which has the same effect as leaving the field out.
Labels, which have no effect here, may have any valid value.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from api.contract.strict import BOUNDED, StrictModel, at_most, neutral

Object = Annotated[dict[str, Any], BOUNDED]
Label = Annotated[str, StringConstraints(max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class LabelFields(StrictModel):
    """Labels that clients attach to a request; they have no effect here."""

    user: str | None = None
    """Accepted, without effect."""
    safety_identifier: Label | None = None
    """Accepted, without effect."""
    prompt_cache_key: str | None = None
    """Accepted, without effect."""
    metadata: Annotated[dict[Label, MetadataValue], at_most(16)] | None = None
    """Accepted, without effect: at most 16 pairs."""
    store: Annotated[bool | None, neutral(False)] = None
    """Accepted when false: nothing is stored."""
    service_tier: Annotated[
        Literal["auto", "default", "flex", "scale", "priority", "fast"] | None, neutral("auto", "default")
    ] = None
    """Accepted as `auto` or `default`."""


class UnservedOpenAIFields(StrictModel):
    """OpenAI's fields, each accepted at its neutral value."""

    n: Annotated[int | None, Field(ge=1, le=128), neutral(1)] = None
    """Only 1 is served so far."""
    logprobs: Annotated[bool | None, neutral(False)] = None
    """Only false is served so far."""
    top_logprobs: Annotated[int | None, Field(ge=0, le=20), neutral(0)] = None
    """Only 0 is served so far."""
    tools: Annotated[list[Object] | None, BOUNDED, neutral([])] = None
    """Only an empty array is served so far."""
    tool_choice: Annotated[str | Object | None, neutral("none", "auto")] = None
    """Only `none` and `auto` are served so far."""
    parallel_tool_calls: Annotated[bool | None, neutral(True)] = None
    """Only true is served so far."""
    functions: Annotated[list[Object] | None, BOUNDED, neutral([])] = None
    """Only an empty array is served."""
    function_call: Annotated[str | Object | None, neutral("none", "auto")] = None
    """Only `none` and `auto` are served."""
    response_format: Annotated[Object | None, neutral({"type": "text"})] = None
    """Only `{"type": "text"}` is served so far."""
    logit_bias: Annotated[Object | None, neutral({})] = None
    """Only an empty object is served so far."""
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2), neutral(0)] = None
    """Only 0 is served so far."""
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2), neutral(0)] = None
    """Only 0 is served so far."""
    reasoning_effort: Annotated[Effort | None, neutral("none", "medium")] = None
    """Only `medium`, the default, and `none` are served."""
    verbosity: Annotated[Literal["low", "medium", "high"] | None, neutral("medium")] = None
    """Only `medium` is served."""
    modalities: Annotated[list[str] | None, BOUNDED, neutral(["text"])] = None
    """Only `["text"]` is served."""
    audio: Annotated[Object | None, neutral()] = None
    """Only null is served."""
    prediction: Annotated[Object | None, neutral()] = None
    """Only null is served."""
    web_search_options: Annotated[Object | None, neutral()] = None
    """Only null is served."""
    moderation: Annotated[Object | None, neutral()] = None
    """Only null is served."""


class UnservedExtensions(StrictModel):
    """Fields of lmdeploy and vLLM, each accepted at its neutral value."""

    min_p: Annotated[float | None, Field(ge=0, le=1), neutral(0)] = None
    """Only 0 is served."""
    repetition_penalty: Annotated[float | None, Field(gt=0), neutral(1)] = None
    """Only 1 is served."""
    skip_special_tokens: Annotated[bool | None, neutral(True)] = None
    """Only true is served."""
    stop_token_ids: Annotated[list[int] | None, BOUNDED, neutral([])] = None
    """Only an empty array is served."""
    include_stop_str_in_output: Annotated[bool | None, neutral(False)] = None
    """Only false is served."""
    chat_template_kwargs: Annotated[Object | None, neutral({})] = None
    """Only an empty object is served."""
    add_generation_prompt: Annotated[bool | None, neutral(True)] = None
    """Only true is served."""
    continue_final_message: Annotated[bool | None, neutral(False)] = None
    """Only false is served."""
    min_new_tokens: Annotated[int | None, Field(ge=0), neutral(0)] = None
    """Only 0 is served; see `min_tokens`."""
    session_id: Annotated[int | None, neutral(-1)] = None
    """Only -1 is served."""
