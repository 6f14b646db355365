"""Tools, variables, reasoning and a message to continue: the parts of a body that the chat template gets."""

import inspect
import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from api.contract.chat_request import ChatCompletionRequest
from api.contract.strict import parse
from api.contract.template_variables import RESERVED
from shared.errors import InvalidRequest, UnsupportedParameter
from shared.messages import NO_INPUTS, TemplateInputs, ToolChoice

USER = {"role": "user", "content": "hi"}
PARAMETERS = {"type": "object", "properties": {"x": {"type": "integer", "maximum": 10**30}}}
FUNCTION = {"name": "add", "description": "adds", "parameters": PARAMETERS}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def parse_fields(**fields: Any) -> ChatCompletionRequest:
    body = {"model": "m", "messages": [USER], **fields}
    return parse(ChatCompletionRequest, json.dumps(body).encode())


def inputs_of(**fields: Any) -> TemplateInputs:
    return parse_fields(**fields).to_template_inputs()


def refusal(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse_fields(**fields)
    return caught.value


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tools": [], "tool_choice": "none"},
        {"chat_template_kwargs": {}},
        {"chat_template_kwargs": {"enable_thinking": None}, "enable_thinking": None},
        {
            "tools": None,
            "tool_choice": "auto",
            "continue_final_message": False,
            "add_generation_prompt": True,
        },
    ],
    ids=str,
)
def test_a_body_without_inputs_makes_none(fields: dict[str, Any]) -> None:
    assert inputs_of(**fields) is NO_INPUTS


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [TOOL], "tool_choice": "none"},
        {"tools": [TOOL], "tool_choice": "none", "parallel_tool_calls": False},
        {"functions": [FUNCTION], "function_call": "none"},
    ],
    ids=str,
)
def test_tools_that_are_not_called_go_to_the_template(fields: dict[str, Any]) -> None:
    assert inputs_of(**fields) == TemplateInputs(tools=[TOOL])


def test_a_tools_marks_for_other_servers_do_not_reach_the_template() -> None:
    function = {"name": "f", "strict": True, "description": None, "defer_loading": False}
    tool = {"type": "function", "function": function, "cache_control": {"type": "ephemeral"}}
    assert inputs_of(tools=[tool], tool_choice="none").tools == [
        {"type": "function", "function": {"name": "f"}}
    ]


NAMED = {"type": "function", "function": {"name": "add"}}
ALLOWED = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}}


@pytest.mark.parametrize(
    ("fields", "choice"),
    [
        ({"tools": [TOOL]}, ToolChoice()),
        ({"tools": [TOOL], "tool_choice": "auto"}, ToolChoice()),
        ({"tools": [TOOL], "tool_choice": "none"}, None),
        ({"tools": [TOOL], "tool_choice": "required"}, ToolChoice(is_required=True)),
        ({"tools": [TOOL], "tool_choice": NAMED}, ToolChoice(is_required=True, names=("add",))),
        ({"tools": [TOOL], "tool_choice": ALLOWED}, ToolChoice(names=("add",))),
        ({"tools": [TOOL], "parallel_tool_calls": False}, ToolChoice(is_single=True)),
        ({"functions": [FUNCTION]}, ToolChoice(is_single=True, is_legacy=True)),
        (
            {"functions": [FUNCTION], "function_call": {"name": "add"}},
            ToolChoice(is_required=True, names=("add",), is_single=True, is_legacy=True),
        ),
        ({"functions": [FUNCTION], "function_call": "none"}, None),
        ({"tools": [], "tool_choice": "auto"}, None),
        ({"tool_choice": "none"}, None),
    ],
    ids=str,
)
def test_the_choice_says_which_tools_may_or_must_be_called(
    fields: dict[str, Any], choice: ToolChoice | None
) -> None:
    assert parse_fields(**fields).to_tool_choice() == choice


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": NAMED}, "tool_choice"),
        ({"function_call": {"name": "add"}}, "function_call"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": 5}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"tools": [TOOL], "tool_choice": {"type": "custom", "custom": {}}}, "tool_choice.type"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}},
            "tool_choice",
        ),
        (
            {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "none"}}},
            "tool_choice.allowed_tools.mode",
        ),
        ({"tools": [TOOL], "functions": [FUNCTION]}, "functions"),
        ({"tools": [TOOL], "function_call": "auto"}, "function_call"),
        ({"functions": [FUNCTION], "tool_choice": "auto"}, "tool_choice"),
        ({"tools": [TOOL], "parallel_tool_calls": 1}, "parallel_tool_calls"),
    ],
    ids=str,
)
def test_a_choice_that_does_not_fit_the_tools_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    assert refusal(**fields).param == param


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        ([{"type": "custom", "custom": {"name": "f"}}], "tools[0].type"),
        ([{"type": "function"}], "tools[0].function"),
        ([TOOL, {"type": "function", "function": {}}], "tools[1].function.name"),
        ([{"type": "function", "function": {"name": "a b"}}], "tools[0].function.name"),
        ([{"type": "function", "function": {"name": "f", "parameters": []}}], "tools[0].function.parameters"),
        ([{"type": "function", "function": {"name": "f", "colour": 1}}], "tools[0].function.colour"),
        ([TOOL] * 129, "tools"),
        ({}, "tools"),
    ],
    ids=str,
)
def test_a_tool_of_the_wrong_form_is_refused_by_name(tools: Any, param: str) -> None:
    assert refusal(tools=tools, tool_choice="none").param == param


def test_a_number_that_no_float_holds_is_refused_in_a_tool_and_in_a_variable() -> None:
    body = json.dumps({"model": "m", "messages": [USER], "tool_choice": "none", "tools": [TOOL]})
    with pytest.raises(InvalidRequest) as caught:
        parse(ChatCompletionRequest, body.replace(str(10**30), "[1e400]").encode())
    assert caught.value.param == "tools[0].function.parameters"
    body = json.dumps({"model": "m", "messages": [USER], "chat_template_kwargs": {"a": 0}})
    with pytest.raises(InvalidRequest) as caught:
        parse(ChatCompletionRequest, body.replace('"a": 0', '"a": 1e400').encode())
    assert caught.value.param == "chat_template_kwargs.a"


def test_both_forms_of_tools_at_once_are_refused() -> None:
    error = refusal(tools=[TOOL], tool_choice="none", functions=[FUNCTION], function_call="none")
    assert error.param == "functions"


def test_scalars_are_variables_of_the_template_and_null_is_none() -> None:
    given = {"enable_thinking": False, "date_string": "today", "budget": 7, "share": 0.5, "nothing": None}
    variables = inputs_of(chat_template_kwargs=given).variables
    assert variables == {"enable_thinking": False, "date_string": "today", "budget": 7, "share": 0.5}
    assert variables["enable_thinking"] is False


def test_hints_are_variables_and_kwargs_take_precedence() -> None:
    assert inputs_of(reasoning_effort="low").variables == {"reasoning_effort": "low"}
    assert inputs_of(enable_thinking=False).variables == {"enable_thinking": False}
    kwargs = {"enable_thinking": True, "reasoning_effort": "high"}
    both = inputs_of(enable_thinking=False, reasoning_effort="low", chat_template_kwargs=kwargs)
    assert both.variables == kwargs


@pytest.mark.parametrize(
    ("given", "error", "field"),
    [
        ({"documents": "x"}, InvalidRequest, "documents"),
        ({"a": 1, "tokenize": False}, InvalidRequest, "tokenize"),
        ({"bos_token": "x"}, InvalidRequest, "bos_token"),
        ({"image_token": None}, InvalidRequest, "image_token"),
        ({"raise_exception": None}, InvalidRequest, "raise_exception"),
        ({"add_generation_prompt": False}, InvalidRequest, "add_generation_prompt"),
        ({"a-b": 1}, InvalidRequest, "a-b"),
        ({"x" * 65: 1}, InvalidRequest, "x" * 65),
        ({"a": "x" * 4_097}, InvalidRequest, "a"),
        ({"a": []}, UnsupportedParameter, "a"),
        ({"a": {"b": 1}}, UnsupportedParameter, "a"),
    ],
)
def test_a_variable_with_a_wrong_name_or_value_is_refused_by_name(
    given: dict[str, Any], error: type[InvalidRequest], field: str
) -> None:
    caught = refusal(chat_template_kwargs=given)
    assert (type(caught), caught.param) == (error, f"chat_template_kwargs.{field}"[:100])


@pytest.mark.parametrize("given", ["x", [], True, {str(number): 1 for number in range(33)}], ids=str)
def test_variables_of_the_wrong_form_are_refused(given: Any) -> None:
    assert str(refusal(chat_template_kwargs=given).param) == "chat_template_kwargs"


def test_the_names_that_the_tokenizer_uses_are_reserved() -> None:
    own = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
    own |= set(inspect.signature(chat_template_utils.render_jinja_template).parameters)
    own |= set(chat_template_utils._compile_jinja_template("{{ 1 }}").environment.globals)
    assert own - RESERVED == set()
    assert all(
        name.endswith("_token") for name in set(PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES) - RESERVED
    )


@pytest.mark.parametrize("add_generation_prompt", [None, False])
def test_the_assistants_last_message_can_be_continued(add_generation_prompt: bool | None) -> None:
    messages = [USER, {"role": "assistant", "content": [{"type": "text", "text": "Once"}]}]
    inputs = inputs_of(
        messages=messages, continue_final_message=True, add_generation_prompt=add_generation_prompt
    )
    assert inputs.continue_final_message


@pytest.mark.parametrize(
    "last",
    [
        USER,
        {"role": "assistant", "content": ""},
        {"role": "assistant", "content": []},
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": "I call", "tool_calls": [CALL]},
        {"role": "assistant", "content": None, "reasoning_content": "hm"},
    ],
    ids=str,
)
def test_no_other_message_can_be_continued(last: dict[str, Any]) -> None:
    error = refusal(messages=[USER, last], continue_final_message=True)
    assert (type(error), error.param) == (InvalidRequest, "continue_final_message")


def test_a_message_is_either_continued_or_followed_by_a_new_one() -> None:
    messages = [{"role": "assistant", "content": "Once"}]
    error = refusal(messages=messages, continue_final_message=True, add_generation_prompt=True)
    assert error.param == "continue_final_message"
    assert inputs_of(messages=messages) is NO_INPUTS


@pytest.mark.parametrize("content", ["", [], None, [{"type": "text", "text": ""}]], ids=str)
@pytest.mark.parametrize("author", [{"role": "assistant"}, {"role": "function", "name": "f"}], ids=str)
def test_an_answer_may_be_empty_in_each_spelling(author: dict[str, Any], content: Any) -> None:
    body = parse_fields(messages=[USER, {**author, "content": content}, USER])
    assert body.messages[1].to_template() == {**author, "content": ""}


@pytest.mark.parametrize("content", ["", []], ids=str)
@pytest.mark.parametrize("role", ["user", "system", "developer"])
def test_an_empty_text_is_allowed_from_everybody(role: str, content: Any) -> None:
    body = parse_fields(messages=[{"role": role, "content": content}])
    assert body.messages[0].to_template() == {"role": role, "content": ""}


@pytest.mark.parametrize("message", [{}, {"content": None}], ids=str)
@pytest.mark.parametrize("role", ["user", "system", "developer", "tool"])
def test_a_question_without_content_is_refused(role: str, message: dict[str, Any]) -> None:
    given = {"role": role, "tool_call_id": "1", **message}
    assert refusal(messages=[given]).param == "messages[0].content"


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
@pytest.mark.parametrize(("text", "passed"), [("why", True), ("", False), (None, False)])
def test_the_assistants_reasoning_goes_to_the_template_whatever_its_name(
    name: str, text: str | None, passed: bool
) -> None:
    body = parse_fields(messages=[USER, {"role": "assistant", "content": "a", name: text}, USER])
    extra = {"reasoning_content": text} if passed else {}
    assert body.messages[1].to_template() == {"role": "assistant", "content": "a", **extra}


def test_parts_of_calls_that_clients_add_do_not_reach_the_template() -> None:
    function = CALL["function"] | {"parsed_arguments": {}}  # type: ignore[operator]
    call = {**CALL, "index": 0, "function": function}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert parse_fields(messages=[message]).messages[0].to_template()["tool_calls"] == [CALL]
    older = {"role": "assistant", "content": None, "function_call": function}
    assert parse_fields(messages=[older]).messages[0].to_template()["function_call"] == CALL["function"]


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        ('{"x": 1}', '{"x": 1}'),
        ("", ""),
        ("no JSON", "no JSON"),
        (None, "{}"),
        ({}, "{}"),
        ({"x": [1, "\u00e4"], "y": None}, '{"x": [1, "\u00e4"], "y": null}'),
    ],
)
def test_arguments_of_a_call_may_be_text_an_object_or_null(given: Any, passed: str) -> None:
    call = {**CALL, "function": {"name": "f", "arguments": given}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    (sent,) = parse_fields(messages=[message]).messages[0].to_template()["tool_calls"]
    assert sent["function"]["arguments"] == passed


@pytest.mark.parametrize("given", [[], [1], 1, True, 0.5])
def test_arguments_of_another_type_are_refused_by_name(given: Any) -> None:
    message = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": given}}
    assert refusal(messages=[message]).param == "messages[0].function_call.arguments"
