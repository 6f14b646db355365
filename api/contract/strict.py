"""Checks request bodies with strict pydantic models, and raises Lorelay's exceptions for their errors."""

import json
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError, from_json

from shared.errors import InvalidRequest, UnsupportedParameter

UNSUPPORTED = "unsupported_parameter"
MAX_PARAM_LENGTH = 100


class StrictModel(BaseModel):
    """Base class of request models: no coercion (`true` and `1.0` are no ints), no unknown fields, no NaN."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, frozen=True, use_attribute_docstrings=True
    )


MAX_NUM_ITEMS = 1_000


def _check_length(value: Any) -> Any:
    if isinstance(value, list) and len(value) > MAX_NUM_ITEMS:
        raise invalid(f"a list has at most {MAX_NUM_ITEMS} items")
    return value


BOUNDED = BeforeValidator(_check_length)
"""Limits the length of a list: pydantic would build an error for each of a million wrong items."""

Model = TypeVar("Model", bound=StrictModel)


def neutral(*values: Any) -> AfterValidator:
    """Creates the validator of a field that OpenAI, lmdeploy or vLLM has and Lorelay does not serve.

    None and `values` are accepted, because they mean the same as leaving the field out. Any other value of
    the right type is refused as unsupported. To serve a field, remove its validator.
    """
    served = " or ".join(json.dumps(value) for value in values or (None,))

    def check(value: Any) -> Any:
        if value is not None and value not in values:
            raise unsupported(f"only {served} is served here")
        return value

    return AfterValidator(check)


def unsupported(message: str) -> PydanticCustomError:
    """Creates the error that a validator raises for a value that OpenAI allows and Lorelay does not serve."""
    return PydanticCustomError(UNSUPPORTED, "{text}", {"text": message})


def invalid(message: str, *, field: str | None = None) -> PydanticCustomError:
    """Creates the error that a validator raises for a wrong value; model validators name the `field`."""
    return PydanticCustomError("invalid", "{text}", {"text": message, "field": field})


def parse(model: type[Model], body: bytes) -> Model:
    """Parses a request body as `model`.

    Raises:
        UnsupportedParameter: a known field has a value that is not served.
        InvalidRequest: the body is no JSON object, or a field is invalid; `param` names the first such field.
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
    """Returns the path of the invalid field in OpenAI's notation, e.g. `messages[0].role`."""
    location = detail["loc"]
    field = detail.get("ctx", {}).get("field")
    path = _path(location, body, ends_outside=detail["type"] == "missing")
    return ".".join(filter(None, (path, field)))


def _path(location: Sequence[int | str], body: Any, *, ends_outside: bool) -> str:
    """Converts `location` to a path in the body; leaves out pydantic's names of union members."""
    path, value = "", body
    for position, step in enumerate(location):
        if isinstance(step, int) and isinstance(value, list):
            path, value = f"{path}[{step}]", value[step]
        elif isinstance(value, dict) and step in value:
            path, value = f"{path}.{step}", value[step]
        elif ends_outside and position == len(location) - 1:
            path = f"{path}.{step}"
    return path.removeprefix(".")
