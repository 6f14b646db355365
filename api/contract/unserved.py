"""Fields of a chat completion that OpenAI, lmdeploy or vLLM know and Lorelay does not serve yet, or ignores.

A client may send them at their neutral value; labels that change nothing are accepted with any valid value.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from api.contract.strict import BOUNDED, StrictModel, neutral

Object = dict[str, Any]
Label = Annotated[str, StringConstraints(max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class LabelFields(StrictModel):
    """Accepted and without effect."""

    user: str | None = None
    """Accepted, without effect."""
    safety_identifier: Label | None = None
    """Accepted, without effect."""
    prompt_cache_key: str | None = None
    """Accepted, without effect."""
    metadata: Annotated[dict[Label, MetadataValue], Field(max_length=16)] | None = None
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
    """Not served yet: 1."""
    logprobs: Annotated[bool | None, neutral(False)] = None
    """Not served yet: false."""
    top_logprobs: Annotated[int | None, Field(ge=0, le=20), neutral(0)] = None
    """Not served yet: 0."""
    tools: Annotated[list[Object] | None, BOUNDED, neutral([])] = None
    """Not served yet: empty."""
    tool_choice: Annotated[str | Object | None, neutral("none", "auto")] = None
    """Not served yet: `none` or `auto`."""
    parallel_tool_calls: Annotated[bool | None, neutral(True)] = None
    """Not served yet: true."""
    functions: Annotated[list[Object] | None, BOUNDED, neutral([])] = None
    """Not served: empty."""
    function_call: Annotated[str | Object | None, neutral("none", "auto")] = None
    """Not served: `none` or `auto`."""
    response_format: Annotated[Object | None, neutral({"type": "text"})] = None
    """Not served yet: `{"type": "text"}`."""
    logit_bias: Annotated[Object | None, neutral({})] = None
    """Not served yet: empty."""
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2), neutral(0)] = None
    """Not served yet: 0."""
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2), neutral(0)] = None
    """Not served yet: 0."""
    reasoning_effort: Annotated[Effort | None, neutral("none", "medium")] = None
    """Not served: `medium`, the default, or `none`."""
    verbosity: Annotated[Literal["low", "medium", "high"] | None, neutral("medium")] = None
    """Not served: `medium`."""
    modalities: Annotated[list[str] | None, BOUNDED, neutral(["text"])] = None
    """Not served: `["text"]`."""
    audio: Annotated[Object | None, neutral()] = None
    """Not served: null."""
    prediction: Annotated[Object | None, neutral()] = None
    """Not served: null."""
    web_search_options: Annotated[Object | None, neutral()] = None
    """Not served: null."""
    moderation: Annotated[Object | None, neutral()] = None
    """Not served: null."""


class UnservedExtensions(StrictModel):
    """Fields of lmdeploy and vLLM, each accepted at its neutral value."""

    min_p: Annotated[float | None, Field(ge=0, le=1), neutral(0)] = None
    """Not served: 0."""
    repetition_penalty: Annotated[float | None, Field(gt=0), neutral(1)] = None
    """Not served: 1."""
    skip_special_tokens: Annotated[bool | None, neutral(True)] = None
    """Not served: true."""
    stop_token_ids: Annotated[list[int] | None, BOUNDED, neutral([])] = None
    """Not served: empty."""
    include_stop_str_in_output: Annotated[bool | None, neutral(False)] = None
    """Not served: false."""
    chat_template_kwargs: Annotated[Object | None, neutral({})] = None
    """Not served: empty."""
    add_generation_prompt: Annotated[bool | None, neutral(True)] = None
    """Not served: true."""
    continue_final_message: Annotated[bool | None, neutral(False)] = None
    """Not served: false."""
    min_new_tokens: Annotated[int | None, Field(ge=0), neutral(0)] = None
    """Not served: 0; see `min_tokens`."""
    session_id: Annotated[int | None, neutral(-1)] = None
    """Not served: -1."""
