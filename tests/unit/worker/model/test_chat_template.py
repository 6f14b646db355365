"""Templates get messages in the form that they read."""

from typing import Any

import pytest

from shared.errors import InvalidRequest
from shared.messages import NO_INPUTS, TemplateInputs
from tests.tokenizers import CHATML, KINDS, LLAMA2, MACRO, QWEN, byte_level, wrap
from worker.model.chat_template import ChatTemplate, decode_arguments
from worker.model.tokenizer import Tokenizer

CONTINUED = TemplateInputs(continue_final_message=True)
ARGUMENTS = "{% for m in messages %}{% for t in m.tool_calls %}{{ SHOWN }};{% endfor %}{% endfor %}"


def show(source: str, messages: list[dict[str, Any]], inputs: TemplateInputs = NO_INPUTS) -> str:
    return ChatTemplate(source, {}).render(messages, inputs).text


def calling(*arguments: str | None) -> list[dict[str, Any]]:
    calls = [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": text}} for text in arguments
    ]
    return [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": calls}]


@pytest.mark.parametrize(
    ("text", "decoded"),
    [
        ('{"a": 1}', {"a": 1}),
        ("null", {}),
        ("", {}),
        (" \n", {}),
        (None, {}),
        ("{}", {}),
        ("not JSON", "not JSON"),
        ('{"a": ', '{"a": '),
        ("[1]", "[1]"),
        ('"text"', '"text"'),
        ("7", "7"),
        ("9" * 5000, "9" * 5000),
        ("[" * 100_000, "[" * 100_000),
        ({"a": 1}, {"a": 1}),
    ],
    ids=lambda value: str(value)[:12],
)
def test_arguments_are_decoded_if_they_are_an_object(text: Any, decoded: Any) -> None:
    assert decode_arguments(text) == decoded


@pytest.mark.parametrize(
    "shown", ["t.function.arguments | tojson", "'{' ~ t.function.arguments | items | list ~ '}'"]
)
def test_a_template_that_reads_arguments_as_a_mapping_gets_one(shown: str) -> None:
    source = ARGUMENTS.replace("SHOWN", shown)
    assert "lorelay" not in show(source, calling('{"city": "Rome"}'))
    assert "city" in show(source, calling('{"city": "Rome"}'))
    assert '\\"' not in show(source, calling('{"a": 1}'))
    assert show("{{ messages[1].tool_calls[0].function.arguments | tojson }}", calling("null")) == "{}"


@pytest.mark.parametrize(
    "shown", ["'```' + t.function.arguments + '```'", "t.function.arguments", "t['function']['arguments']"]
)
def test_a_template_that_reads_arguments_as_text_gets_them_as_they_were_sent(shown: str) -> None:
    assert '{"city":"Rome"}' in show(ARGUMENTS.replace("SHOWN", shown), calling('{"city":"Rome"}'))


def test_arguments_that_are_no_json_reach_the_template_as_they_are() -> None:
    assert '"arguments": city=Rome}' in show(QWEN, calling("city=Rome"))


@pytest.mark.parametrize(
    "content", ["hi there", [{"type": "text", "text": "hi"}, {"type": "text", "text": " there"}]]
)
@pytest.mark.parametrize("source", [CHATML, MACRO])
def test_a_template_gets_content_as_text_or_as_parts_whichever_it_reads(source: str, content: Any) -> None:
    assert "user\nhi there<|im_end|>" in show(source, [{"role": "user", "content": content}])


def test_content_is_found_out_for_a_template_that_refuses_other_chats() -> None:
    picky = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}" + MACRO
    assert "hi<|im_end|>" in show(picky, [{"role": "system", "content": "hi"}])


def test_reasoning_reaches_templates_by_each_of_its_names() -> None:
    messages = [{"role": "assistant", "content": "", "reasoning_content": "so"}]
    for name in ("reasoning_content", "thinking", "reasoning"):
        assert show("{{ messages[0]." + name + " }}", messages) == "so"


def test_null_fields_are_left_out() -> None:
    messages = [{"role": "assistant", "content": None, "tool_calls": None, "reasoning_content": None}]
    assert show("{{ messages[0] | length }}", messages) == "1"


@pytest.mark.parametrize("template", [CHATML, LLAMA2, QWEN, MACRO])
@pytest.mark.parametrize("text", ["The answer is", "ends in spaces  ", "<|im_end|> no"])
def test_an_answer_continues_the_last_message_as_in_transformers(template: str, text: str) -> None:
    backend = wrap(KINDS["byte-level BPE"](), template)
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": text},
    ]
    rendered = Tokenizer(backend, frozenset())._templates[template].render(messages, CONTINUED).text
    if template == MACRO:
        messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    assert rendered == backend.apply_chat_template(messages, continue_final_message=True, tokenize=False)


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        (CHATML, [{"role": "user", "content": "hi"}]),
        (CHATML, [{"role": "assistant", "content": ""}]),
        (CHATML, [{"role": "assistant", "content": None}]),
        ("{{ messages | length }}", [{"role": "assistant", "content": "hi"}]),
    ],
)
def test_a_message_that_can_t_be_continued_is_refused(template: str, messages: list[dict[str, Any]]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        show(template, messages, CONTINUED)
    assert caught.value.param == "continue_final_message"


def test_a_last_message_from_the_assistant_is_followed_by_a_new_turn_unless_it_is_continued() -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "so"}]
    assert show(CHATML, messages).endswith("so<|im_end|>\n<|im_start|>assistant\n")
    assert show(CHATML, messages, CONTINUED).endswith("assistant\nso")


def test_variables_of_a_request_don_t_replace_those_of_the_template() -> None:
    inputs = TemplateInputs(
        variables={"messages": "x", "bos_token": "x", "add_generation_prompt": False, "y": 1}
    )
    source = "{{ bos_token }}{{ messages | length }}{{ add_generation_prompt }}{{ y }}"
    template = ChatTemplate(source, {"bos_token": "<s>"})
    assert template.render([{"role": "user", "content": ""}], inputs).text == "<s>1True1"


def test_a_template_of_its_own_is_used_for_chats_with_tools() -> None:
    backend = wrap(byte_level(), CHATML)
    backend.chat_template = {"default": "no tools", "tool_use": "{{ tools | length }} tools"}
    tokenizer = Tokenizer(backend, frozenset())
    tool = {"type": "function", "function": {"name": "f"}}
    for inputs, text in ((NO_INPUTS, "no tools"), (TemplateInputs(tools=[tool]), "1 tools")):
        assert tokenizer.decode(tokenizer.encode_chat([{"role": "user", "content": ""}], inputs)) == text
