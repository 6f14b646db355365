"""The format of a model's answers is found by its chat template; calls in this format can be forced."""

import json
from typing import Any

import pytest
from jinja2 import TemplateError
from llguidance import LLMatcher, LLTokenizer

from shared.errors import UnsupportedParameter
from shared.grammars import fault_of
from shared.messages import GenerationRequest, SamplingParams, TemplateInputs, ToolChoice
from tests.streams import make_request
from tests.tokenizers import CHATML, QWEN, byte_level, wrap
from worker.model.tokenizer import Tokenizer

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/City"}},
            "$defs": {"City": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
CALL = {"name": "get_weather", "arguments": '{"city": "Rome"}'}
CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "Is it warm?"},
    {
        "role": "assistant",
        "content": "I look.",
        "tool_calls": [{"id": "1", "type": "function", "function": CALL}],
    },
    {"role": "tool", "content": "21 degrees", "tool_call_id": "1"},
]
LLAMA3 = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.tool_calls %}{% set c = m.tool_calls[0].function %}"
    '{{ \'{"name": "\' + c.name + \'", "parameters": \' + c.arguments | tojson + "}" }}'
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
)
QWEN3_5 = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}{% for c in m.tool_calls %}<tool_call>\n<function={{ c.function.name }}>\n</function>\n"
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
)
FORMS = {"Qwen": QWEN, "Llama 3": LLAMA3, "tool prompt": CHATML}


def tokenizer_of(template: str, **config: Any) -> Tokenizer:
    backend = wrap(byte_level(), template)
    for name, value in config.items():
        setattr(backend, name, value)
    return Tokenizer(backend, frozenset())


def request_of(choice: ToolChoice | None, **sampling: Any) -> GenerationRequest:
    inputs = TemplateInputs(tools=[WEATHER, NOW])
    return make_request(
        request_id="r", tool_choice=choice, template_inputs=inputs, sampling=SamplingParams(**sampling)
    )


def accepts(tokenizer: Tokenizer, grammar: str, text: str) -> bool:
    """True if the grammar allows the text as a whole answer."""
    assert fault_of(grammar) is None
    assert tokenizer.definition is not None
    prepared = LLTokenizer(tokenizer.definition, eos_token=sorted(tokenizer.eos_token_ids))
    matcher = LLMatcher(prepared, grammar, log_level=0)
    token_ids = tokenizer.backend(text, add_special_tokens=False)["input_ids"]
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


def divided(tokenizer: Tokenizer, request: GenerationRequest, text: str) -> list[tuple[str, Any]]:
    """The calls in an answer."""
    parser = tokenizer.message_parser(request, 0, [])
    assert parser is not None
    calls = parser.add(text).tool_calls + parser.finish(is_cut=False).tool_calls
    return [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (QWEN, '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'),
        (LLAMA3, '{"name": "get_weather", "parameters": {"city": "Oslo"}}'),
        (CHATML, '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'),
    ],
    ids=list(FORMS),
)
def test_a_call_that_the_grammar_allows_is_read_as_a_call(template: str, text: str) -> None:
    tokenizer, request = tokenizer_of(template), request_of(ToolChoice(is_required=True))
    grammar = tokenizer.grammar_of(request)
    assert accepts(tokenizer, grammar, text)
    assert divided(tokenizer, request, text) == [("get_weather", {"city": "Oslo"})]
    for wrong in ("hello", text.replace("Oslo", "Bonn"), text.replace("get_weather", "look"), text[:-1]):
        assert not accepts(tokenizer, grammar, wrong), wrong


def test_several_calls_are_allowed_unless_the_choice_is_single_and_only_of_allowed_tools() -> None:
    tokenizer = tokenizer_of(QWEN)
    now = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    for choice, single, several in (
        (ToolChoice(is_required=True), True, True),
        (ToolChoice(is_required=True, is_single=True), True, False),
        (ToolChoice(is_required=True, names=("get_weather",)), False, False),
    ):
        grammar = tokenizer.grammar_of(request_of(choice))
        assert accepts(tokenizer, grammar, now) is single
        assert accepts(tokenizer, grammar, f"{now}\n{now}") is several


def test_an_answer_with_a_grammar_may_be_calls_in_its_place() -> None:
    tokenizer = tokenizer_of(QWEN)
    grammar = tokenizer.grammar_of(request_of(ToolChoice(), grammar=LLMatcher.grammar_from_regex("yes|no")))
    assert accepts(tokenizer, grammar, "yes")
    assert accepts(tokenizer, grammar, '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>')
    assert not accepts(tokenizer, grammar, "maybe")


def test_calls_in_a_form_without_grammar_can_be_read_but_not_forced() -> None:
    tokenizer = tokenizer_of(QWEN3_5)
    text = "<tool_call>\n<function=now>\n</function>\n</tool_call>"
    assert divided(tokenizer, request_of(ToolChoice()), text) == [("now", {})]
    with pytest.raises(UnsupportedParameter, match="send tool_choice 'auto'") as caught:
        tokenizer.grammar_of(request_of(ToolChoice(is_required=True)))
    assert caught.value.param == "tool_choice"


def test_a_template_that_ignores_tools_gets_a_prompt_with_tools_calls_and_results() -> None:
    tokenizer = tokenizer_of(CHATML)
    shown = tokenizer.backend.decode(tokenizer.encode_chat(CHAT, TemplateInputs(tools=[WEATHER])))
    assert '"description": "Tells the weather."' in shown
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>' in shown
    assert "<tool_response>\n21 degrees\n</tool_response>" in shown
    assert "I look." in shown
    with_system = [{"role": "system", "content": "Be brief."}, *CHAT]
    shown = tokenizer.backend.decode(tokenizer.encode_chat(with_system, TemplateInputs(tools=[WEATHER])))
    assert shown.count("<|im_start|>system") == 1
    assert "Be brief." in shown
    assert "<tools>" not in tokenizer.backend.decode(tokenizer.encode_chat(CHAT))


def test_a_template_that_shows_tools_gets_the_messages_as_they_are() -> None:
    tokenizer = tokenizer_of(QWEN)
    shown = tokenizer.backend.decode(tokenizer.encode_chat(CHAT, TemplateInputs(tools=[WEATHER])))
    assert shown.count("<tools>") == 0
    assert shown.count("<tool_call>") == 1


def test_a_chat_without_tools_is_divided_only_if_the_model_reasons() -> None:
    request = make_request(reads_reasoning=True)
    assert tokenizer_of(CHATML).message_parser(request, 0, []) is None
    assert tokenizer_of(LLAMA3).message_parser(request, 0, []) is None
    parser = tokenizer_of(QWEN).message_parser(request, 0, [])
    assert parser is not None
    assert parser.add("<think>hm</think>yes").reasoning == "hm"


def test_ids_of_calls_are_the_same_at_every_worker_and_differ_between_calls_and_choices() -> None:
    text = '<tool_call>{"name": "now", "arguments": {}}</tool_call>' * 2
    ids: list[str] = []
    for index in (0, 0, 1):
        parser = tokenizer_of(QWEN).message_parser(request_of(ToolChoice()), index, [])
        assert parser is not None
        ids += [call.id for call in parser.add(text).tool_calls]
    first, again, other = ids[:2], ids[2:4], ids[4:]
    assert first == again
    assert len({*first, *other}) == 4


def test_a_malformed_response_template_is_refused() -> None:
    with pytest.raises(TemplateError, match=r"response_template: .*start_anchor"):
        tokenizer_of(CHATML, response_template={"fields": {"content": {}}})


def test_an_api_that_does_not_read_reasoning_gets_it_in_the_text() -> None:
    assert tokenizer_of(QWEN).message_parser(make_request(), 0, []) is None


def test_the_older_form_of_calls_and_results_is_shown_in_the_newer_one() -> None:
    chat = [
        {"role": "user", "content": "Is it warm?"},
        {"role": "assistant", "content": "", "function_call": CALL},
        {"role": "function", "name": "get_weather", "content": "21 degrees"},
    ]
    for template in (QWEN, CHATML):
        tokenizer = tokenizer_of(template)
        shown = tokenizer.backend.decode(tokenizer.encode_chat(chat, TemplateInputs(tools=[WEATHER])))
        assert '{"name": "get_weather", "arguments": {"city": "Rome"}}' in shown
        assert "21 degrees" in shown
        assert "<|im_start|>function" not in shown


@pytest.mark.parametrize("template", ["text", {"fields": []}, {"fields": {"tool_calls": []}}, {"fields": 5}])
def test_every_malformed_response_template_is_refused(template: object) -> None:
    with pytest.raises(TemplateError, match="response_template: "):
        tokenizer_of(CHATML, response_template=template)
