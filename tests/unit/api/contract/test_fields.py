"""Every field that a client may send is known: served, without effect, or refused by name."""

import json
import re
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from openai.resources.chat.completions import Completions
from openai.resources.completions import Completions as TextCompletions
from openai.types import chat, completion_create_params, shared_params
from openai.types.chat import completion_create_params as params
from pydantic import BaseModel

from api.chat_routes import parse_chat
from api.contract.chat_messages import ChatMessage, FunctionCall, TextPart, ToolCall
from api.contract.chat_request import ChatCompletionRequest
from api.contract.chat_tools import FunctionDefinition, Tool
from api.contract.completion_request import CompletionRequest
from api.contract.field_table import MODELS, as_markdown, rows
from api.contract.fields import Only
from api.contract.form_fields import JsonSchemaFormat, ResponseFormat, StructuredOutputs
from api.contract.generation_fields import StreamOptions
from api.contract.steps import run_at_once
from api.contract.strict import StrictModel, parse
from api.contract.unserved import CacheOptions
from shared.errors import InvalidRequest, UnsupportedParameter
from shared.messages import GenerationRequest, decode_request

DOCS = Path(__file__).parents[4] / "docs/fields.md"
NOT_IN_A_BODY = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f"}}


OBJECTS: dict[type[StrictModel], str] = {
    StreamOptions: "stream_options",
    StructuredOutputs: "structured_outputs",
    CacheOptions: "prompt_cache_options",
}
"""Fields of the body whose values are objects with optional fields only, by their models."""


def body_with(model: type[StrictModel], fields: dict[str, Any]) -> dict[str, Any]:
    """Returns a valid body to which `fields` are added at the place of `model`."""
    message: dict[str, Any] = {"role": "assistant", "content": "hi"}
    body: dict[str, Any] = {"model": "m", "stream": True, "tool_choice": "none", "messages": [message]}
    if model is CompletionRequest:
        return {"model": "m", "prompt": "hi", "stream": True} | fields
    if model is ChatCompletionRequest:
        body |= fields
    elif model in OBJECTS:
        body[OBJECTS[model]] = fields
    elif model is ResponseFormat:
        body["response_format"] = {"type": "text"} | fields
    elif model is JsonSchemaFormat:
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": {}} | fields}
    elif model is ChatMessage:
        message |= fields
    elif model is TextPart:
        message["content"] = [{"type": "text", "text": "hi"} | fields]
    elif model is ToolCall:
        message["tool_calls"] = [CALL | fields]
    elif model is FunctionCall:
        message["function_call"] = {"name": "f", "arguments": "{}"} | fields
    elif model is Tool:
        body["tools"] = [TOOL | fields]
    elif model is FunctionDefinition:
        body["tools"] = [{"type": "function", "function": {"name": "f"} | fields}]
    return body


def parse_body(body: dict[str, Any]) -> StrictModel:
    model = CompletionRequest if "prompt" in body else ChatCompletionRequest
    return parse(model, json.dumps(body).encode())


def parse_text(name: str, written: str) -> ChatCompletionRequest:
    """Parses a body with a field whose value is written so."""
    body = json.dumps(body_with(ChatCompletionRequest, {name: "VALUE"}))
    return parse(ChatCompletionRequest, body.replace('"VALUE"', written).encode())


def refusal(model: type[StrictModel], fields: dict[str, Any]) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse_body(body_with(model, fields))
    return caught.value


def fields_of_client(*types: Any) -> set[str]:
    """Returns the names of the fields of OpenAI's types for a place in the body."""
    names: set[str] = set()
    for one in types:
        fields = one.model_fields if isinstance(one, type) and issubclass(one, BaseModel) else None
        names |= set(get_type_hints(one) if fields is None else fields)
    return names


OFFICIAL = {
    ChatCompletionRequest: fields_of_client(
        params.CompletionCreateParamsNonStreaming, params.CompletionCreateParamsStreaming
    )
    | set(signature(Completions.create).parameters) - NOT_IN_A_BODY,
    CompletionRequest: fields_of_client(
        completion_create_params.CompletionCreateParamsNonStreaming,
        completion_create_params.CompletionCreateParamsStreaming,
    )
    | set(signature(TextCompletions.create).parameters) - NOT_IN_A_BODY,
    StreamOptions: fields_of_client(chat.ChatCompletionStreamOptionsParam),
    ResponseFormat: fields_of_client(
        shared_params.ResponseFormatText,
        shared_params.ResponseFormatJSONObject,
        shared_params.ResponseFormatJSONSchema,
    ),
    JsonSchemaFormat: fields_of_client(shared_params.response_format_json_schema.JSONSchema),
    StructuredOutputs: set(),
    CacheOptions: fields_of_client(params.PromptCacheOptions),
    ChatMessage: fields_of_client(
        *get_args(chat.ChatCompletionMessageParam),
        chat.ChatCompletionMessage,
        chat.ParsedChatCompletionMessage,
    ),
    TextPart: fields_of_client(chat.ChatCompletionContentPartTextParam),
    ToolCall: fields_of_client(
        chat.ChatCompletionMessageFunctionToolCallParam, chat.chat_completion_chunk.ChoiceDeltaToolCall
    ),
    FunctionCall: fields_of_client(
        chat.chat_completion_message_function_tool_call_param.Function, chat.ParsedFunction
    ),
    Tool: fields_of_client(chat.ChatCompletionFunctionToolParam),
    FunctionDefinition: fields_of_client(
        chat.completion_create_params.Function,
        get_type_hints(chat.ChatCompletionFunctionToolParam)["function"],
    ),
}
"""The fields of the installed official client, by the model that must know them."""


@pytest.mark.parametrize("model", list(MODELS.values()))
def test_each_field_of_the_official_client_is_known(model: type[StrictModel]) -> None:
    unknown = OFFICIAL[model] - {row.name for row in rows(model)}
    assert not unknown, f"add a row for each of {sorted(unknown)} to {model.__name__}, and to docs/fields.md"


def test_the_docs_have_the_table_of_the_code() -> None:
    written = DOCS.read_text().partition("<!-- table -->\n\n")[2]
    assert written == as_markdown(), "replace the tables by field_table.as_markdown()"


def refused_fields(model: type[StrictModel]) -> Iterator[tuple[str, Only]]:
    for name, field in model.model_fields.items():
        for marker in field.metadata:
            if isinstance(marker, Only):
                yield name, marker


@pytest.mark.parametrize("model", list(MODELS.values()))
def test_a_refused_field_passes_with_the_values_that_mean_the_same_as_none(model: type[StrictModel]) -> None:
    for name, marker in refused_fields(model):
        for value in (None, *marker.values):
            parse_body(body_with(model, {name: value}))


@pytest.mark.parametrize("model", list(MODELS.values()))
def test_a_refused_field_is_named_with_any_other_value(model: type[StrictModel]) -> None:
    for name, marker in refused_fields(model):
        for value in ("x y", True, False, 7, 0.5, ["x"], {"x": 1}):
            if value not in marker.values:
                error = refusal(model, {name: value})
                assert name in re.split(r"[.\[]", str(error.param)), (value, error.param)


@pytest.mark.parametrize(
    "fields",
    [
        {"priority": False},
        {"best_of": True},
        {"dynatemp_range": "0"},
        {"echo": 0},
        {"lora": {}},
    ],
    ids=str,
)
def test_a_value_of_another_type_than_the_accepted_one_is_refused(fields: dict[str, Any]) -> None:
    (name,) = fields
    error = refusal(ChatCompletionRequest, fields)
    assert (type(error), error.param) == (UnsupportedParameter, name)


def test_a_null_within_an_accepted_object_is_as_good_as_none() -> None:
    parse_body(body_with(ChatCompletionRequest, {"response_format": {"type": "text", "json_schema": None}}))


@pytest.mark.parametrize("model", list(MODELS.values()))
def test_null_is_as_good_as_none_at_every_place(model: type[StrictModel]) -> None:
    for name, field in model.model_fields.items():
        if not field.is_required():
            parse_body(body_with(model, {name: None}))


@pytest.mark.parametrize("model", list(MODELS.values()))
def test_an_unknown_field_is_refused_by_name_at_every_place(model: type[StrictModel]) -> None:
    error = refusal(model, {"colour": None})
    assert type(error) is InvalidRequest
    assert str(error.param).split(".")[-1] == "colour"


def integer_fields() -> Iterator[Any]:
    for model in MODELS.values():
        for name, schema in model.model_json_schema()["properties"].items():
            kinds = [schema, *schema.get("anyOf", ())]
            if any(kind.get("type") == "integer" for kind in kinds):
                yield pytest.param(model, name, id=f"{model.__name__}.{name}")


@pytest.mark.parametrize(("model", "name"), list(integer_fields()))
def test_an_integer_may_be_written_with_a_point(model: type[StrictModel], name: str) -> None:
    value = {"top_logprobs": 0, "min_new_tokens": 0, "session_id": -1}.get(name, 1)
    assert parse_body(body_with(model, {name: float(value)})) == parse_body(body_with(model, {name: value}))
    for wrong in (1.5, True, "1", 1e300, [1], {}):
        assert name in str(refusal(model, {name: wrong}).param)


def test_the_integers_are_those_that_clients_send_as_floats() -> None:
    found = {param.values[1] for param in integer_fields()}
    assert found >= {
        "n",
        "seed",
        "max_tokens",
        "max_completion_tokens",
        "min_tokens",
        "top_k",
        "top_logprobs",
    }


@pytest.mark.parametrize("written", ["150.0", "1.5e2", "150"])
def test_all_spellings_of_an_integer_are_the_same(written: str) -> None:
    assert parse_text("max_tokens", written).max_output_tokens == 150


@pytest.mark.parametrize(
    "name", ["max_tokens", "seed", "top_k", "temperature", "min_p", "repetition_penalty"]
)
@pytest.mark.parametrize("written", ["1e400", "-1e400", "9" * 400, "NaN", "Infinity"])
def test_a_number_that_no_float_holds_is_refused(name: str, written: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_text(name, written)


def test_the_last_of_two_fields_with_one_name_counts() -> None:
    assert parse_text("seed", '1, "seed": 2').seed == 2


def test_an_argument_of_the_client_that_ends_up_in_a_body_is_refused_with_the_way_out() -> None:
    error = refusal(ChatCompletionRequest, {"extra_body": {"top_k": 5}})
    assert (type(error), error.param) == (UnsupportedParameter, "extra_body")
    assert re.search("send its fields themselves", error.message)


@pytest.mark.parametrize(
    ("options", "counts_at_the_end", "counts_in_each_chunk"),
    [
        (None, False, False),
        ({}, False, False),
        ({"include_usage": False, "continuous_usage_stats": True}, False, False),
        ({"include_usage": True, "continuous_usage_stats": False}, True, False),
        ({"include_usage": True, "continuous_usage_stats": None}, True, False),
        ({"include_usage": True, "continuous_usage_stats": True}, True, True),
    ],
    ids=str,
)
def test_the_options_of_a_stream_are_those_of_vllm(
    options: dict[str, Any] | None, counts_at_the_end: bool, counts_in_each_chunk: bool
) -> None:
    body = parse_body(body_with(ChatCompletionRequest, {"stream_options": options}))
    assert (body.include_usage, body.continuous_usage) == (counts_at_the_end, counts_in_each_chunk)


@pytest.mark.parametrize("options", [{}, {"include_usage": None}, {"include_usage": False}], ids=str)
def test_options_that_set_nothing_are_no_error_without_a_stream(options: dict[str, Any]) -> None:
    parse_body(body_with(ChatCompletionRequest, {"stream": False, "stream_options": options}))


def test_the_adapters_name_at_sglang_must_be_that_of_the_model() -> None:
    parse_body(body_with(ChatCompletionRequest, {"lora_path": "m"}))
    error = refusal(ChatCompletionRequest, {"lora_path": "other"})
    assert (type(error), error.param) == (UnsupportedParameter, "lora_path")


ODD_VALUES: list[Any] = [
    True,
    -1,
    150.0,
    10**30,
    "\u2028\0",
    [],
    {},
    [None],
    [{}],
    {"a": None},
    {"": [1]},
    ["x"] * 5,
]


def outcome_of(given: dict[str, Any]) -> GenerationRequest | InvalidRequest:
    """Returns what becomes of a body: a request for the workers, or the error that refuses it."""
    raw = json.dumps(given).encode()
    try:
        if "prompt" in given:
            text = parse(CompletionRequest, raw)
            return GenerationRequest("id", "m", "base", text.to_sampling(), prompts=text.prompt)
        body, messages = run_at_once(parse_chat(raw))
    except InvalidRequest as error:
        return error
    inputs = body.to_template_inputs()
    return GenerationRequest("id", "m", "base", body.to_sampling(), messages, template_inputs=inputs)


@pytest.mark.parametrize("model", list(MODELS.values()))
def test_an_odd_value_is_refused_by_name_or_reaches_the_worker_unchanged(model: type[StrictModel]) -> None:
    for name in model.model_fields:
        for value in ODD_VALUES:
            outcome = outcome_of(body_with(model, {name: value}))
            if isinstance(outcome, GenerationRequest):
                assert decode_request(outcome.encode()) == outcome, (name, value)
            else:
                assert name in str(outcome.param), (name, value)
