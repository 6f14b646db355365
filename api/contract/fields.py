"""Markers that say whether Lorelay serves a field of a request.

The request models are the table of all fields. A field without a marker is served. A field with `IGNORED` has
no effect. A field with `Only` is refused, except with the marker's values. Schema, docs and tests read this
table through `field_table.rows`. To serve a field, remove its marker.
"""

import json
from typing import Any

from pydantic import BeforeValidator, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from api.contract.strict import unsupported


class Ignored:
    """Marks a field whose valid values are accepted and have no effect."""


IGNORED = Ignored()


class Only:
    """Marks a field that is refused, unless its value is null or means the same as leaving the field out."""

    def __init__(self, *values: Any, instead: str = "") -> None:
        """Accepts `values` besides null; `instead` tells clients what to send in place of other values."""
        self.values = values
        self._message = f"{instead}; " * bool(instead) + f"only {either(values)} is served here"

    def check(self, value: Any) -> Any:
        """Returns the value; raises the error of an unsupported parameter if the value is not accepted."""
        plain = _without_nulls(value)
        if value is not None and not any(_is_same(plain, accepted) for accepted in self.values):
            raise unsupported(self._message)
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Lets pydantic call `check` with each value that has the right type."""
        return core_schema.no_info_after_validator_function(self.check, handler(source))


def _is_same(value: Any, accepted: Any) -> bool:
    """True if both are the same JSON value: 1.0 equals 1, but true does not."""
    return bool(value == accepted) and isinstance(value, bool) == isinstance(accepted, bool)


def _without_nulls(value: Any) -> Any:
    """Leaves out the null fields of an object, because clients write optional fields as null."""
    if isinstance(value, dict):
        return {name: field for name, field in value.items() if field is not None}
    return value


def either(values: tuple[Any, ...]) -> str:
    """Returns the values as JSON, joined by `or`; null if there are none."""
    return " or ".join(json.dumps(value) for value in values or (None,))


def _to_integer(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


INTEGRAL = BeforeValidator(_to_integer)
"""Lets an integer be written as 150.0, because some clients write all numbers as floats."""
