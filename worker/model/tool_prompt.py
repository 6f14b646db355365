"""Messages for chat templates that ignore tools, or that know only the newer form of calls.

The tool prompt describes the tools in the system message.

Calls have the format of Hermes, which many models have seen in training.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

Messages = list[dict[str, Any]]

_BEGIN = """\
You may call the functions that are described within <tools></tools>:
<tools>
"""
_END = """
</tools>
To call a function, write its name and arguments as JSON within <tool_call></tool_call>:
<tool_call>
{"name": "FUNCTION", "arguments": {"PARAMETER": "VALUE"}}
</tool_call>"""


def with_tool_calls(messages: Messages) -> Messages:
    """Returns messages in which the older `function_call`s and `function` messages have the newer form."""
    return [_with_tool_call(number, message) for number, message in enumerate(messages)]


def _with_tool_call(number: int, message: dict[str, Any]) -> dict[str, Any]:
    if call := message.get("function_call"):
        kept = {name: value for name, value in message.items() if name != "function_call"}
        return {**kept, "tool_calls": [{"id": _id_of(number), "type": "function", "function": call}]}
    if message.get("role") == "function":
        return {**message, "role": "tool", "tool_call_id": _id_of(number - 1)}
    return message


def _id_of(number: int) -> str:
    """Returns an id for the call in the message with this number; some templates demand 9 characters."""
    return f"call{number:05}"


def with_tool_prompt(messages: Messages, tools: Sequence[Mapping[str, Any]]) -> Messages:
    """Returns the messages with the tools in the system message, and with calls and results as text.

    Results of tools become messages of the user, because a template that ignores tools knows no other role.
    """
    plain = [_as_text(message) for message in messages]
    if not tools:
        return plain
    prompt = _BEGIN + "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools) + _END
    if plain and plain[0].get("role") in ("system", "developer"):
        first, *rest = plain
        return [{**first, "content": f"{_text_of(first.get('content'))}\n\n{prompt}"}, *rest]
    return [{"role": "system", "content": prompt}, *plain]


def _as_text(message: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in message.items() if name not in ("tool_calls", "tool_call_id")}
    content = _text_of(message.get("content"))
    if message.get("role") == "tool":
        return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}
    calls = [_call_text(call["function"]) for call in message.get("tool_calls") or ()]
    return {**kept, "content": "\n".join(filter(None, [content, *calls]))} if calls else kept


def _call_text(function: Mapping[str, Any]) -> str:
    arguments = function.get("arguments")
    written = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
    name = json.dumps(function["name"], ensure_ascii=False)
    return f'<tool_call>\n{{"name": {name}, "arguments": {written or "{}"}}}\n</tool_call>'


def _text_of(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""
