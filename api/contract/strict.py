"""How request bodies are checked: strict pydantic models, and their failures as our exceptions."""

import json
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError, from_json

from shared.errors import InvalidRequest, UnsupportedParameter

UNSUPPORTED = "unsupported_parameter"
MAX_PARAM_LENGTH = 100


class StrictModel(BaseModel):
    """No coercion (a bool is no int, `1.0` is no int), no unknown fields, no NaN or infinity."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, frozen=True, use_attribute_docstrings=True
    )


MAX_NUM_ITEMS = 1_000


def _check_length(value: Any) -> Any:
    if isinstance(value, list) and len(value) > MAX_NUM_ITEMS:
        raise invalid(f"a list has at most {MAX_NUM_ITEMS} items")
    return value


BOUNDED = BeforeValidator(_check_length)
"""For lists: pydantic makes an error of every wrong item; very many would hold the process up."""

Model = TypeVar("Model", bound=StrictModel)


def neutral(*values: Any) -> AfterValidator:
    """Marks a field that OpenAI or a sibling server knows and Lorelay does not serve yet.

    None and `values` mean what leaving it out means, and pass; any other value of the right type is refused
    as unsupported. Serving the field one day means taking the mark away.
    """
    served = " or ".join(json.dumps(value) for value in values or (None,))

    def check(value: Any) -> Any:
        if value is not None and value not in values:
            raise unsupported(f"only {served} is served here")
        return value

    return AfterValidator(check)


def unsupported(message: str) -> PydanticCustomError:
    """For validators: right by OpenAI's contract, not served by Lorelay."""
    return PydanticCustomError(UNSUPPORTED, "{text}", {"text": message})


def invalid(message: str, *, field: str | None = None) -> PydanticCustomError:
    """For validators: wrong; a validator of a whole model names the `field` at fault."""
    return PydanticCustomError("invalid", "{text}", {"text": message, "field": field})


def parse(model: type[Model], body: bytes) -> Model:
    """A request body as `model`.

    Raises:
        UnsupportedParameter: a known field has a value that is not served.
        InvalidRequest: not JSON, not an object, or a field is wrong; `param` names the first one.
    """
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest(f"The request body is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise InvalidRequest("The request body must be a JSON object.")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise _to_exception(first, value) from None


def _to_exception(detail: ErrorDetails, body: Any) -> InvalidRequest:
    param = _param(detail, body)[:MAX_PARAM_LENGTH]
    if detail["type"] == UNSUPPORTED:
        return UnsupportedParameter(f"Unsupported parameter: '{param}': {detail['msg']}.", param=param)
    if detail["type"] == "extra_forbidden":
        return InvalidRequest(f"Unrecognized request argument supplied: {param}.", param=param)
    if detail["type"] == "missing":
        return InvalidRequest(f"Missing required parameter: '{param}'.", param=param)
    return InvalidRequest(f"Invalid value for '{param}': {detail['msg']}.", param=param)


def _param(detail: ErrorDetails, body: Any) -> str:
    """Where it is wrong, in OpenAI's notation: `messages[0].role`."""
    location = detail["loc"]
    field = detail.get("ctx", {}).get("field")
    path = _path(location, body, ends_outside=detail["type"] == "missing")
    return ".".join(filter(None, (path, field)))


def _path(location: Sequence[int | str], body: Any, *, ends_outside: bool) -> str:
    """`location` without pydantic's own steps (names of union members), which lead nowhere in the body."""
    path, value = "", body
    for position, step in enumerate(location):
        if isinstance(step, int) and isinstance(value, list):
            path, value = f"{path}[{step}]", value[step]
        elif isinstance(value, dict) and step in value:
            path, value = f"{path}.{step}", value[step]
        elif ends_outside and position == len(location) - 1:
            path = f"{path}.{step}"
    return path.removeprefix(".")
