"""Tool calls in OpenAI's JSON: the parts that a chunk of a stream has, and whole calls in one body."""

from collections.abc import Iterable
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from shared.messages import ToolCallPart


class FunctionPart(msgspec.Struct, frozen=True):
    """A part of a call: the name comes once, and the texts of the arguments are to be joined."""

    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class CallPart(msgspec.Struct, frozen=True):
    """A part of one call; only the first part of a call has its id."""

    index: int
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: FunctionPart | UnsetType = UNSET


class Function(msgspec.Struct, frozen=True):
    """The function that the model calls, and its arguments as JSON text."""

    name: str
    arguments: str


class Call(msgspec.Struct, frozen=True):
    """One call that the model made."""

    id: str
    type: Literal["function"]
    function: Function


def to_call_part(part: ToolCallPart) -> CallPart:
    """Returns a part of a call in OpenAI's form."""
    if not part.id:
        return CallPart(part.index, function=to_function_part(part))
    return CallPart(part.index, part.id, "function", to_function_part(part))


def to_function_part(part: ToolCallPart) -> FunctionPart:
    """Returns a part of a call in the older form, `function_call`, which has no id."""
    return FunctionPart(part.name or UNSET, part.arguments)


def joined_calls(parts: Iterable[ToolCallPart]) -> list[Call]:
    """Returns the calls that these parts make up."""
    calls: dict[int, Call] = {}
    for part in parts:
        begun = calls.get(part.index)
        if begun is None:
            calls[part.index] = Call(part.id, "function", Function(part.name, part.arguments))
        else:
            whole = Function(begun.function.name, begun.function.arguments + part.arguments)
            calls[part.index] = Call(begun.id, "function", whole)
    return list(calls.values())
