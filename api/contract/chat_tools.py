"""Tools that a request describes to the model."""

import json
from typing import Annotated, Any

from pydantic import AfterValidator, StringConstraints

from api.contract.fields import IGNORED, Only
from api.contract.strict import StrictModel, invalid, unsupported


def _check_type(value: str) -> str:
    if value == "custom":
        raise unsupported("only 'function' is served here")
    if value != "function":
        raise invalid("Input should be 'function'")
    return value


FunctionType = Annotated[str, AfterValidator(_check_type)]
"""Type of a tool and of a call."""


def _check_finite(value: Any) -> Any:
    """Returns the value; raises an error if it contains a number that is too large for a float (1e400)."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise invalid("a number is too large") from None
    return value


Schema = Annotated[dict[str, Any], AfterValidator(_check_finite)]


FunctionName = Annotated[str, StringConstraints(pattern="^[a-zA-Z0-9_.-]{1,64}$")]


class FunctionDefinition(StrictModel):
    """A function that the chat template describes to the model."""

    name: FunctionName
    """The function's name: up to 64 letters, digits, `_`, `-` and `.`."""
    description: str | None = None
    """The purpose of the function."""
    parameters: Schema | None = None
    """The function's parameters, as a JSON schema."""
    strict: Annotated[bool | None, IGNORED] = None
    """Calls that fit the schema exactly; calls that `tool_choice` demands fit it in any case."""
    defer_loading: Annotated[Any, Only(False)] = None

    def to_template(self) -> dict[str, Any]:
        """Returns the function as the chat template gets it."""
        function = self.model_dump(include={"name", "description", "parameters"}, exclude_none=True)
        return {"type": "function", "function": function}


class Tool(StrictModel):
    """A tool that the chat template describes to the model."""

    type: FunctionType
    """`function`; other types are not served."""
    function: FunctionDefinition
    """The function."""
    cache_control: Annotated[Any, IGNORED] = None
    """Mark for the prompt cache of other servers."""
    defer_loading: Annotated[Any, Only(False)] = None
