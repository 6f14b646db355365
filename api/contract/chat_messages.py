"""The messages of a chat, in OpenAI's format."""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from api.contract.chat_tools import FunctionType
from api.contract.fields import IGNORED, INTEGRAL, Only
from api.contract.strict import BOUNDED, MAX_NUM_ITEMS, StrictModel, invalid, unsupported

OTHER_PART_TYPES = (
    *("image_url", "input_audio", "file", "refusal", "video_url", "audio_url", "image_embeds"),
    *("thinking", "reasoning", "tool_reference", "input_text", "output_text", "input_image", "input_file"),
)
ASSISTANTS_FIELDS = ("tool_calls", "function_call", "reasoning_content", "reasoning")
WRITERS_OF_NOTHING = ("assistant", "function")
"""Roles whose content may be null, which is no text: OpenAI's types allow it for them."""


def _check_part_type(value: str) -> str:
    if value == "text":
        return value
    if value in OTHER_PART_TYPES:
        raise unsupported("only parts of type 'text' are served here")
    raise invalid("Input should be 'text'")


class TextPart(StrictModel):
    """A piece of a message's content."""

    type: Annotated[str, AfterValidator(_check_part_type)]
    """`text`; other part types are not served."""
    text: str
    """The text; parts are joined without a separator."""
    cache_control: Annotated[Any, IGNORED] = None
    """Mark for the prompt cache of other servers."""
    prompt_cache_breakpoint: Annotated[Any, IGNORED] = None
    """Mark for OpenAI's prompt cache."""
    annotations: Annotated[list[Any] | None, Only([])] = None
    """Sources of the text."""


def _to_json_text(value: Any) -> Any:
    """Returns a call's arguments as JSON text, also if a client sent an object or null instead of text."""
    if value is None:
        return "{}"
    if not isinstance(value, dict):
        return value
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise invalid("a number is too large") from None


class FunctionCall(StrictModel):
    """A function that an assistant called, with its arguments."""

    name: str
    """The function's name."""
    arguments: Annotated[str, BeforeValidator(_to_json_text)]
    """The function's arguments, as JSON text. An object is accepted, too, and null for no arguments."""
    parsed_arguments: Annotated[Any, IGNORED] = None
    """The arguments again, as OpenAI's client parses them."""


class ToolCall(StrictModel):
    """A call that an assistant made earlier in the conversation."""

    id: str
    """Id of the call; the `tool` message that answers it repeats the id as `tool_call_id`."""
    type: FunctionType
    """`function`; calls of other types are not served."""
    function: FunctionCall
    """The function and its arguments."""
    index: Annotated[Annotated[int, Field(ge=0, le=MAX_NUM_ITEMS), INTEGRAL] | None, IGNORED] = None
    """Number of the call, which clients keep from a stream's chunks."""


NOT_FOR_TEMPLATES: Any = {
    "tool_calls": {"__all__": {"index": True, "function": {"parsed_arguments"}}},
    "function_call": {"parsed_arguments"},
}
"""Parts of calls that are accepted and have no effect."""


def _content_kind(value: Any) -> str:
    return "parts" if isinstance(value, list) else "text"


Content = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[TextPart], Field(fail_fast=True), BOUNDED, Tag("parts")],
    Discriminator(_content_kind),
]


class ChatMessage(StrictModel):
    """One message of the conversation so far."""

    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    """Author of the message."""
    content: Content | None = None
    """A string, or an array of text parts. An empty array is an empty text.

    Null is an empty text, too, from an assistant or a function; from other roles it is refused.
    """
    reasoning_content: str | None = None
    """The assistant's reasoning before its answer, for templates that know it."""
    reasoning: str | None = None
    """Newer name of `reasoning_content`."""
    name: str | None = None
    """Name of the author; in a `function` message, name of the function that answers."""
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True), BOUNDED] | None = None
    """Calls that the assistant made."""
    tool_call_id: str | None = None
    """In a `tool` message: id of the call that it answers."""
    function_call: FunctionCall | None = None
    """The call that the assistant made, in the older format that `tool_calls` replaced."""
    refusal: Annotated[str | None, Only()] = None
    """The assistant's refusal in place of an answer."""
    annotations: Annotated[list[Any] | None, Only([])] = None
    """Sources of the answer."""
    audio: Annotated[dict[str, Any] | None, Only()] = None
    """Id of a spoken answer."""
    parsed: Annotated[Any, IGNORED] = None
    """The content again, as OpenAI's client parses it."""
    id: Annotated[Any, IGNORED] = None
    """Id that a client gave the message."""
    prefix: Annotated[Any, Only(False, instead="use continue_final_message")] = None
    partial: Annotated[Any, Only(False, instead="use continue_final_message")] = None
    cache_control: Annotated[Any, IGNORED] = None
    """Mark for the prompt cache of other servers."""
    provider_specific_fields: Annotated[Any, IGNORED] = None
    """Notes that LiteLLM adds to an answer."""
    thinking_blocks: Annotated[Any, Only([])] = None
    reasoning_details: Annotated[Any, Only([])] = None
    images: Annotated[Any, Only([])] = None

    @model_validator(mode="after")
    def _fits_its_role(self) -> "ChatMessage":
        for field in ASSISTANTS_FIELDS if self.role != "assistant" else ():
            if getattr(self, field):
                raise invalid("only an assistant's message has it", field=field)
        if self.role == "tool" and self.tool_call_id is None:
            raise invalid("a tool message needs the id of the call it answers", field="tool_call_id")
        if self.role == "function" and self.name is None:
            raise invalid("a function message needs the function's name", field="name")
        if self.content is None and self.role not in WRITERS_OF_NOTHING:
            raise invalid(
                "a message needs content: a string, maybe empty, or an array of text parts", field="content"
            )
        return self

    @property
    def has_calls(self) -> bool:
        """True if the assistant called a tool."""
        return bool(self.tool_calls or self.function_call)

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""

    def to_template(self) -> dict[str, Any]:
        """Returns the message for the chat template: content as one string, and other non-empty fields."""
        message: dict[str, Any] = {"role": self.role, "content": self.text}
        if self.name:
            message["name"] = self.name
        if self.tool_call_id:
            message["tool_call_id"] = self.tool_call_id
        if self.has_calls:
            calls = self.model_dump(include={"tool_calls", "function_call"}, exclude=NOT_FOR_TEMPLATES)
            message |= {name: value for name, value in calls.items() if value}
        if reasoning := self.reasoning_content or self.reasoning:
            message["reasoning_content"] = reasoning
        return message
