"""Checks request bodies with strict pydantic models, and raises Lorelay's exceptions for their errors."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from api.contract.json_body import decoded
from api.contract.steps import Steps, run_at_once
from shared.errors import InvalidRequest, UnsupportedParameter

UNSUPPORTED = "unsupported_parameter"
UNKNOWN = "unknown_field"
EXTRA = "extra_forbidden"
"""Pydantic's own name for an unknown field."""
TOO_LONG = "too_long"
MAX_PARAM_LENGTH = 100


class StrictModel(BaseModel):
    """Base class of request models: no coercion (`true` and `"1"` are no ints), no unknown fields, no NaN."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, frozen=True, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _has_few_fields(cls, value: Any) -> Any:
        """Refuses an object with too many fields before pydantic builds an error for each unknown field."""
        if isinstance(value, dict) and len(value) > MAX_NUM_FIELDS:
            unknown = next(name for name in value if name not in cls.model_fields)
            raise PydanticCustomError(UNKNOWN, "unknown field", {"field": unknown})
        return value


MAX_NUM_FIELDS = 250
"""A limit above the number of fields of every model."""
MAX_NUM_ITEMS = 1_000


def at_most(num_items: int) -> BeforeValidator:
    """Creates the validator that limits the number of items of an array, or of fields of an object.

    Without this limit, pydantic would check all items, and build an error for each wrong item.
    """

    def check(value: Any) -> Any:
        if isinstance(value, list | dict) and len(value) > num_items:
            kind, items = ("an object", "fields") if isinstance(value, dict) else ("a list", "items")
            raise PydanticCustomError(
                TOO_LONG, "{text}", {"text": f"{kind} has at most {num_items} {items} here"}
            )
        return value

    return BeforeValidator(check)


BOUNDED = at_most(MAX_NUM_ITEMS)
"""Limits the number of items or fields to `MAX_NUM_ITEMS`."""

Model = TypeVar("Model", bound=StrictModel)


def unsupported(message: str, *, field: str | None = None) -> PydanticCustomError:
    """Creates the error for a value that OpenAI allows and Lorelay does not serve; see `invalid`."""
    return PydanticCustomError(UNSUPPORTED, "{text}", {"text": message, "field": field})


def invalid(message: str, *, field: str | None = None) -> PydanticCustomError:
    """Creates the error that a validator raises for a wrong value.

    A validator of a whole model must pass the name of the wrong field. If the validator belongs to a field,
    pydantic adds the name.
    """
    return PydanticCustomError("invalid", "{text}", {"text": message, "field": field})


def parse(model: type[Model], body: bytes) -> Model:
    """Parses a request body as `model` without a pause; see `parsed`."""
    return run_at_once(parsed((model,), body))


def parsed(
    models: Sequence[type[Model]], body: bytes, items: Mapping[str, type[StrictModel]] = {}
) -> Steps[Model]:
    """Parses a request body step by step, as the first of `models` with all of its fields, else as the last.

    `items` maps each field that may be a long list to the model of the list's items. One item is one step.

    Raises:
        UnsupportedParameter: a known field has a value that is not served.
        InvalidRequest: the body is no JSON object, has too many values, or a field is invalid; `param` names
            the first such field.
    """
    value = yield from decoded(body, lambda beginning: _refuse_beginning(models[-1], beginning))
    model = next((model for model in models if value.keys() <= model.model_fields.keys()), models[-1])
    if value.keys() <= model.model_fields.keys():
        for field, item_model in items.items():
            if isinstance(value.get(field), list):
                value[field] = yield from _validated(item_model, value[field])
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise _to_exception(first, value) from None


def _validated(model: type[StrictModel], items: list[Any]) -> Steps[list[Any]]:
    """Validates one item per step; returns the first wrong item and all items after it unchanged."""
    checked: list[Any] = []
    for item in items:
        try:
            checked.append(model.model_validate(item))
        except ValidationError:
            return checked + items[len(checked) :]
        yield
    return checked


def _refuse_beginning(model: type[StrictModel], value: dict[str, Any]) -> None:
    """Raises an error if the first values of a body include an unknown field or a list that is too long."""
    try:
        model.model_validate(value)
    except ValidationError as error:
        for detail in error.errors(include_url=False, include_input=False):
            if detail["type"] in (UNKNOWN, EXTRA, TOO_LONG):
                raise _to_exception(detail, value) from None


def _to_exception(detail: ErrorDetails, body: Any) -> InvalidRequest:
    param = _param(detail, body)[:MAX_PARAM_LENGTH]
    if detail["type"] == UNSUPPORTED:
        return UnsupportedParameter(f"Unsupported parameter: '{param}': {detail['msg']}.", param=param)
    if detail["type"] in (UNKNOWN, EXTRA):
        return InvalidRequest(f"Unrecognized request argument supplied: {param}.", param=param)
    if detail["type"] == "missing":
        return InvalidRequest(f"Missing required parameter: '{param}'.", param=param)
    return InvalidRequest(f"Invalid value for '{param}': {detail['msg']}.", param=param)


def _param(detail: ErrorDetails, body: Any) -> str:
    """Returns the path of the invalid field in OpenAI's notation, such as `messages[0].role`."""
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
