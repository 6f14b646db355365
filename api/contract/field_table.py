"""The table of all fields of requests, for the OpenAPI schema, docs/fields.md and the tests."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic.fields import FieldInfo

from api.contract.chat_messages import ChatMessage, FunctionCall, TextPart, ToolCall
from api.contract.chat_request import ChatCompletionRequest
from api.contract.chat_tools import FunctionDefinition, Tool
from api.contract.completion_request import CompletionRequest
from api.contract.fields import Ignored, Only, either
from api.contract.form_fields import JsonSchemaFormat, ResponseFormat, StructuredOutputs
from api.contract.generation_fields import StreamOptions
from api.contract.strict import StrictModel
from api.contract.unserved import CacheOptions

State = Literal["served", "without effect", "refused"]
STATES: tuple[State, ...] = ("served", "without effect", "refused")
MODELS: dict[str, type[StrictModel]] = {
    "The body of a chat completion": ChatCompletionRequest,
    "The body of a completion": CompletionRequest,
    "`stream_options`": StreamOptions,
    "`response_format`": ResponseFormat,
    "`response_format.json_schema`": JsonSchemaFormat,
    "`structured_outputs`": StructuredOutputs,
    "`prompt_cache_options`": CacheOptions,
    "`messages[]`": ChatMessage,
    "`messages[].content[]`": TextPart,
    "`messages[].tool_calls[]`": ToolCall,
    "`messages[].tool_calls[].function`, `messages[].function_call`": FunctionCall,
    "`tools[]`": Tool,
    "`tools[].function`, `functions[]`": FunctionDefinition,
}
"""Models of the body and of its parts, by their place in the body."""


@dataclass(frozen=True)
class Row:
    """One field of a request model."""

    name: str
    state: State
    accepted: str
    """The values with which a refused field is accepted, as JSON; empty in any other state."""
    text: str
    """The sentences of docs and schema about the field."""


def rows(model: type[StrictModel]) -> Iterator[Row]:
    """Yields the rows of a model, in the order of its fields."""
    for name, field in model.model_fields.items():
        yield _row(name, field)


def _row(name: str, field: FieldInfo) -> Row:
    only = next((marker for marker in field.metadata if isinstance(marker, Only)), None)
    text = field.description or ""
    if only is not None:
        accepted = either((None, *only.values))
        return Row(name, "refused", accepted, f"{text} Refused, except {accepted}.".lstrip())
    if any(isinstance(marker, Ignored) for marker in field.metadata):
        return Row(name, "without effect", "", f"{text} Accepted, without effect.".lstrip())
    return Row(name, "served", "", text)


def as_markdown() -> str:
    """Returns the tables of docs/fields.md: for each model, its fields by state.

    The table of completions leaves out fields that are the same in chat completions.
    """
    sections = []
    of_chats = set(rows(ChatCompletionRequest))
    for place, model in MODELS.items():
        lines = [f"## {place}", "", "| field | state | |", "|---|---|---|"]
        listed = [row for row in rows(model) if model is not CompletionRequest or row not in of_chats]
        ordered = sorted(listed, key=lambda row: STATES.index(row.state))
        lines += [f"| `{row.name}` | {row.state} | {_cell(row)} |" for row in ordered]
        sections.append("\n".join(lines))
    return "\n\n".join(sections) + "\n"


def _cell(row: Row) -> str:
    return " ".join(row.text.replace("|", "\\|").split())
