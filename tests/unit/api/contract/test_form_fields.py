"""The fields that bind an answer to a form: at most one of them, in the spelling of whichever server."""

import json
from typing import Any

import pytest

from api.contract.chat_request import ChatCompletionRequest
from api.contract.form_fields import Form
from api.contract.strict import parse
from shared.errors import InvalidRequest, UnsupportedParameter

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
ANY_OBJECT = {"type": "object"}


def form_of(**fields: Any) -> Form | None:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]} | fields
    return parse(ChatCompletionRequest, json.dumps(body).encode()).form


FORMS: list[tuple[dict[str, Any], Form | None]] = [
    ({}, None),
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, Form("json_schema", ANY_OBJECT, "response_format")),
    (
        {"response_format": JSON_SCHEMA},
        Form("json_schema", SCHEMA, "response_format.json_schema.schema"),
    ),
    ({"structured_outputs": {}}, None),
    ({"structured_outputs": {"json_object": False}}, None),
    ({"structured_outputs": {"json": SCHEMA}}, Form("json_schema", SCHEMA, "structured_outputs.json")),
    ({"structured_outputs": {"regex": "a+"}}, Form("regex", "a+", "structured_outputs.regex")),
    ({"structured_outputs": {"choice": ["a"]}}, Form("choice", ["a"], "structured_outputs.choice")),
    ({"structured_outputs": {"grammar": "g"}}, Form("grammar", "g", "structured_outputs.grammar")),
    (
        {"structured_outputs": {"json_object": True}},
        Form("json_schema", ANY_OBJECT, "structured_outputs.json_object"),
    ),
    (
        {"structured_outputs": {"json": "{}", "whitespace_pattern": " ?"}},
        Form("json_schema", "{}", "structured_outputs.json", " ?"),
    ),
    (
        {"structured_outputs": {"json": "{}", "disable_any_whitespace": True}},
        Form("json_schema", "{}", "structured_outputs.json", ""),
    ),
    ({"guided_json": SCHEMA}, Form("json_schema", SCHEMA, "guided_json")),
    (
        {"guided_json": "{}", "guided_whitespace_pattern": "[ ]?"},
        Form("json_schema", "{}", "guided_json", "[ ]?"),
    ),
    ({"guided_regex": "a"}, Form("regex", "a", "guided_regex")),
    ({"guided_choice": ["a", "b"]}, Form("choice", ["a", "b"], "guided_choice")),
    ({"guided_grammar": "g"}, Form("grammar", "g", "guided_grammar")),
    ({"regex": "a"}, Form("regex", "a", "regex")),
    ({"ebnf": "g"}, Form("grammar", "g", "ebnf")),
    ({"grammar": "g"}, Form("grammar", "g", "grammar")),
    ({"grammar": ""}, None),
    ({"json_schema": SCHEMA}, Form("json_schema", SCHEMA, "json_schema")),
    ({"json_schema": {}}, None),
]


@pytest.mark.parametrize(("fields", "form"), FORMS, ids=str)
def test_each_servers_field_gives_the_same_form(fields: dict[str, Any], form: Form | None) -> None:
    assert form_of(**fields) == form


def test_the_keys_of_a_schema_keep_their_order() -> None:
    form = form_of(response_format=JSON_SCHEMA)
    assert form is not None
    assert [*form.value["properties"]] == ["b", "a"]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": JSON_SCHEMA | {"type": "json_object"}}, "response_format.json_schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
        "response_format.json_schema.name",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
        "response_format.json_schema.schema",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": [1]}}},
        "response_format.json_schema.schema",
    ),
    ({"guided_regex": ""}, "guided_regex"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_choice": ["a", 1]}, "guided_choice[1]"),
    ({"guided_choice": ["a"] * 1001}, "guided_choice"),
    ({"regex": "a", "guided_regex": "b"}, "regex"),
    ({"response_format": JSON_SCHEMA, "guided_json": {}}, "guided_json"),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs.regex"),
    ({"guided_whitespace_pattern": " ?"}, "guided_whitespace_pattern"),
    ({"guided_regex": "a", "guided_whitespace_pattern": " ?"}, "guided_whitespace_pattern"),
    ({"structured_outputs": {"whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=str)
def test_a_wrong_form_is_refused_by_its_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        form_of(**fields)
    assert caught.value.param == param


def test_a_form_that_is_not_served_is_unsupported() -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        form_of(structured_outputs={"structural_tag": {"type": "structural_tag"}})
    assert caught.value.param == "structured_outputs.structural_tag"
