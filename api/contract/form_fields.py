"""The fields of OpenAI, vLLM, SGLang and llama.cpp that set the form of the answer."""

import json
import warnings
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, StringConstraints, model_validator

from api.contract.fields import IGNORED, Only
from api.contract.strict import BOUNDED, StrictModel, invalid
from api.contract.unserved import Object

MAX_NUM_WORDS = 1_000
Text = Annotated[str, StringConstraints(min_length=1)]
Words = Annotated[list[Text], BOUNDED, Field(min_length=1, max_length=MAX_NUM_WORDS)]
Schema = Annotated[dict[str, Any] | str, BOUNDED]
ANY_OBJECT: dict[str, Any] = {"type": "object"}


class Form(NamedTuple):
    """The form that an answer must have, as the client specified it."""

    kind: Literal["json_schema", "regex", "choice", "grammar"]
    value: Any
    """A schema as object or text, a regular expression, a list of texts, or a grammar in Lark or GBNF."""
    field: str
    """The field that gave the form, for error messages."""
    whitespace: str | None = None
    """Regular expression for the white space within JSON; None for the default, and empty for none."""


# Pydantic warns of fields that hide its own deprecated methods of these names.
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Field name", UserWarning)

    class JsonSchemaFormat(StrictModel):
        """A JSON schema, with a name for it."""

        name: Annotated[str, StringConstraints(pattern="^[a-zA-Z0-9_-]{1,64}$")]
        """Name of the schema, of up to 64 letters, digits, `_` and `-`."""
        description: Annotated[str | None, IGNORED] = None
        """Purpose of the schema; the prompt should describe the form that the model has to write."""
        schema: Object  # type: ignore[assignment]
        """The JSON schema that the answer follows."""
        strict: bool | None = None
        """The schema is enforced as it is written, whatever the value."""

    class StructuredOutputs(StrictModel):
        """vLLM's object that sets the form of the answer; only one of its forms can be set."""

        json: Schema | None = None  # type: ignore[assignment]
        """JSON schema, as an object or as text."""
        regex: Text | None = None
        """Regular expression that the whole answer matches."""
        choice: Words | None = None
        """Texts, one of which is the answer."""
        grammar: Text | None = None
        """Grammar in llguidance's dialect of Lark, or in GBNF."""
        json_object: bool | None = None
        """True: any JSON object."""
        disable_any_whitespace: bool | None = None
        """True: JSON without white space, whatever `LORELAY_JSON_WHITESPACE` says."""
        whitespace_pattern: str | None = None
        """Regular expression for the white space within JSON."""
        disable_fallback: Annotated[bool | None, IGNORED] = None
        """Permission for vLLM to take another library for grammars."""
        disable_additional_properties: Annotated[Any, Only(False)] = None
        structural_tag: Annotated[Any, Only()] = None


class ResponseFormat(StrictModel):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    """`text`, `json_object` (any JSON object) or `json_schema`."""
    json_schema: JsonSchemaFormat | None = None
    """The schema, with `type: "json_schema"`."""

    @model_validator(mode="after")
    def _has_the_schema_of_its_type(self) -> Self:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise invalid("given if, and only if, the type is 'json_schema'", field="json_schema")
        return self


class FormFields(StrictModel):
    """The fields that set the form of the answer; a request can set only one of them."""

    response_format: ResponseFormat | None = None
    """Form of the answer: text, any JSON object, or JSON that follows a schema. Default: text."""
    structured_outputs: StructuredOutputs | None = None
    """vLLM's way to bind the answer to a JSON schema, regular expression, choice or grammar."""
    guided_json: Schema | None = None
    """Older form of `structured_outputs.json`."""
    guided_regex: Text | None = None
    """Older form of `structured_outputs.regex`."""
    guided_choice: Words | None = None
    """Older form of `structured_outputs.choice`."""
    guided_grammar: Text | None = None
    """Older form of `structured_outputs.grammar`."""
    guided_whitespace_pattern: str | None = None
    """Older form of `structured_outputs.whitespace_pattern`."""
    guided_decoding_backend: Annotated[str | None, IGNORED] = None
    """Choice of vLLM's library for grammars."""
    regex: Text | None = None
    """SGLang's name for `structured_outputs.regex`."""
    ebnf: Text | None = None
    """SGLang's name for `structured_outputs.grammar`."""
    grammar: str | None = None
    """llama.cpp's name for `structured_outputs.grammar`; an empty text means none."""
    json_schema: Object | None = None
    """llama.cpp's name for `structured_outputs.json`; an empty object means none."""

    @model_validator(mode="after")
    def _has_one_form(self) -> Self:
        forms = self._forms()
        if len(forms) > 1:
            raise invalid(f"not together with '{forms[0].field}'", field=forms[1].field)
        spaces = self._whitespace_field
        if spaces and not (forms and forms[0].kind == "json_schema"):
            raise invalid("only allowed with a JSON schema", field=spaces)
        return self

    @property
    def form(self) -> Form | None:
        """The form that the answer must have; None if it may be any text."""
        return next(iter(self._forms()), None)

    @property
    def _whitespace_field(self) -> str | None:
        if self.guided_whitespace_pattern is not None:
            return "guided_whitespace_pattern"
        outputs = self.structured_outputs
        has_pattern = outputs is not None and outputs.whitespace_pattern is not None
        return "structured_outputs.whitespace_pattern" if has_pattern else None

    def _forms(self) -> list[Form]:
        fields = [
            *self._response_forms(),
            *self._structured_forms(),
            ("json_schema", self.guided_json, "guided_json"),
            ("regex", self.guided_regex, "guided_regex"),
            ("choice", self.guided_choice, "guided_choice"),
            ("grammar", self.guided_grammar, "guided_grammar"),
            ("regex", self.regex, "regex"),
            ("grammar", self.ebnf, "ebnf"),
            ("grammar", self.grammar or None, "grammar"),
            ("json_schema", self.json_schema or None, "json_schema"),
        ]
        return [
            Form(kind, value, field, self._whitespace()) for kind, value, field in fields if value is not None
        ]

    def _response_forms(self) -> list[tuple[Any, Any, str]]:
        given = self.response_format
        if given is None or given.type == "text":
            return []
        if given.json_schema is None:
            return [("json_schema", ANY_OBJECT, "response_format")]
        return [("json_schema", given.json_schema.schema, "response_format.json_schema.schema")]

    def _structured_forms(self) -> list[tuple[Any, Any, str]]:
        given = self.structured_outputs
        if given is None:
            return []
        return [
            ("json_schema", given.json, "structured_outputs.json"),
            ("regex", given.regex, "structured_outputs.regex"),
            ("choice", given.choice, "structured_outputs.choice"),
            ("grammar", given.grammar, "structured_outputs.grammar"),
            ("json_schema", ANY_OBJECT if given.json_object else None, "structured_outputs.json_object"),
        ]

    def _whitespace(self) -> str | None:
        """Returns the client's regular expression for white space within JSON, if there is one."""
        if self.guided_whitespace_pattern is not None:
            return self.guided_whitespace_pattern
        given = self.structured_outputs
        if given is not None and given.disable_any_whitespace:
            return ""
        return None if given is None else given.whitespace_pattern


def as_schema(value: dict[str, Any] | str) -> str:
    """Returns a JSON schema as text, with its keys in their order.

    Raises:
        ValueError: the text is not JSON, or the schema is not an object.
    """
    schema = json.loads(value) if isinstance(value, str) else value
    if not isinstance(schema, dict):
        raise ValueError("a JSON schema must be an object")
    if not isinstance(schema.get("x-guidance", {}), dict):
        raise ValueError("'x-guidance' must be an object")
    return json.dumps(schema, ensure_ascii=False, allow_nan=False)
