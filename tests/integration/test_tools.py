"""Calls of tools through OpenAI's client; alone, the tiny model's letters would be no calls."""

import json

import openai
import pytest

from tests.deployment import Deployment

WEATHER = {
    "type": "function",
    "function": {
        "name": "rain",
        "parameters": {
            "type": "object",
            "properties": {"wet": {"type": "boolean"}},
            "required": ["wet"],
            "additionalProperties": False,
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
MESSAGES = [{"role": "user", "content": "hi"}]


def check_weather(arguments: str) -> None:
    assert json.loads(arguments) in ({"wet": True}, {"wet": False})


def test_a_required_call_fits_its_schema_and_its_result_can_be_sent_back(served: Deployment) -> None:
    client = served.client()
    for model in ("tiny", "a"):
        options = {"model": model, "tools": [WEATHER], "max_tokens": 85}
        choice = {"type": "function", "function": {"name": "rain"}}
        reply = client.chat.completions.create(
            messages=MESSAGES, tool_choice=choice, parallel_tool_calls=False, n=2, **options
        )
        for answer in reply.choices:
            assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
            (call,) = answer.message.tool_calls
            assert call.function.name == "rain"
            check_weather(call.function.arguments)
        result = {"role": "tool", "tool_call_id": call.id, "content": "21 degrees"}
        again = client.chat.completions.create(
            model=model, messages=[*MESSAGES, answer.message, result], max_tokens=8
        )
        # The prompt has the call and its result, without the description of the tools.
        assert again.usage.prompt_tokens > len(call.function.arguments) + len("21 degrees")


def test_a_streamed_call_is_the_one_of_the_whole_answer(served: Deployment) -> None:
    options = {
        "model": "tiny",
        "messages": MESSAGES,
        "tools": [WEATHER],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "seed": 5,
        "max_tokens": 85,
    }
    client = served.client()
    (whole,) = client.chat.completions.create(**options).choices[0].message.tool_calls
    with client.chat.completions.stream(**options) as stream:
        choice = stream.get_final_completion().choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert (call.function.name, call.function.arguments) == (whole.function.name, whole.function.arguments)
    check_weather(call.function.arguments)


def test_the_older_functions_are_called_in_the_older_form(served: Deployment) -> None:
    options = {
        "model": "tiny",
        "messages": MESSAGES,
        "functions": [WEATHER["function"]],
        "function_call": {"name": "rain"},
        "max_tokens": 85,
    }
    client = served.client()
    answer = client.chat.completions.create(**options).choices[0]
    assert answer.finish_reason == "function_call"
    check_weather(answer.message.function_call.arguments)
    chunks = list(client.chat.completions.create(**options, stream=True))
    parts = [chunk.choices[0].delta.function_call for chunk in chunks if chunk.choices[0].delta.function_call]
    assert parts[0].name == "rain"
    check_weather("".join(part.arguments for part in parts))
    assert chunks[-1].choices[0].finish_reason == "function_call"


def test_tools_that_may_be_called_leave_an_answer_without_calls_as_it_is(served: Deployment) -> None:
    options = {"model": "tiny", "messages": MESSAGES, "tools": [NOW], "temperature": 0, "max_tokens": 8}
    client = served.client()
    may, must_not = (client.chat.completions.create(**options, tool_choice=word) for word in ("auto", "none"))
    assert may.choices[0].message.content == must_not.choices[0].message.content
    assert may.choices[0].message.tool_calls is None


def test_a_schema_that_cant_be_enforced_is_refused_before_it_is_queued(served: Deployment) -> None:
    parameters = {"type": "object", "properties": {"x": {"type": "array", "uniqueItems": True}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    with pytest.raises(openai.BadRequestError, match="uniqueItems") as caught:
        served.client().chat.completions.create(
            model="tiny", messages=MESSAGES, tools=[NOW, tool], tool_choice="required"
        )
    assert caught.value.param == "tools[1].function.parameters"
