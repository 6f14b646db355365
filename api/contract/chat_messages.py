"""The messages of a chat, in OpenAI's format."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from api.contract.strict import BOUNDED, StrictModel, invalid, neutral, unsupported

OTHER_PART_TYPES = ("image_url", "input_audio", "file", "refusal", "video_url")


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


class FunctionCall(StrictModel):
    """A function that an assistant called, with its arguments."""

    name: str
    """The function's name."""
    arguments: str
    """The function's arguments, as JSON text."""


class ToolCall(StrictModel):
    """A call that an assistant made earlier in the conversation."""

    id: str
    """Id of the call; the `tool` message that answers it repeats the id as `tool_call_id`."""
    type: Literal["function"]
    """Always `function`."""
    function: FunctionCall
    """The function and its arguments."""


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
    """A string, or an array of text parts. Null only in an assistant message that calls tools."""
    name: str | None = None
    """Name of the author; in a `function` message, name of the function that answers."""
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True), BOUNDED] | None = None
    """Calls that the assistant made."""
    tool_call_id: str | None = None
    """In a `tool` message: id of the call that it answers."""
    function_call: FunctionCall | None = None
    """The call that the assistant made, in the older format that `tool_calls` replaced."""
    refusal: Annotated[str | None, neutral()] = None
    """Only null is served."""
    annotations: Annotated[list[Any] | None, neutral([])] = None
    """Only null and an empty array are served."""
    audio: Annotated[dict[str, Any] | None, neutral()] = None
    """Only null is served."""

    @model_validator(mode="after")
    def _fits_its_role(self) -> "ChatMessage":
        calls = self.tool_calls or self.function_call
        if calls and self.role != "assistant":
            raise invalid(
                "only an assistant calls tools", field="tool_calls" if self.tool_calls else "function_call"
            )
        if self.role == "tool" and self.tool_call_id is None:
            raise invalid("a tool message needs the id of the call it answers", field="tool_call_id")
        if self.role == "function" and self.name is None:
            raise invalid("a function message needs the function's name", field="name")
        if self.content is None and not calls:
            raise invalid("a message needs content, as a string or an array of text parts", field="content")
        return self

    def to_template(self) -> dict[str, Any]:
        """Returns the message for the chat template: content as one string, and other non-empty fields."""
        rest = self.model_dump(include={"name", "tool_calls", "tool_call_id", "function_call"})
        return {
            "role": self.role,
            "content": self._text(),
            **{name: value for name, value in rest.items() if value},
        }

    def _text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""
