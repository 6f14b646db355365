"""Grammars are checked before the enqueue; nothing that a schema demands is dropped."""

import asyncio
import json
import threading
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from api import grammars
from api.contract.form_fields import Form
from api.grammars import GrammarChecker
from shared.errors import InvalidRequest
from shared.grammars import MAX_GRAMMAR_BYTES
from shared.settings import ApiSettings

EOS = 256


class Bytes:
    """A tokenizer with a token for each byte."""

    eos_token_id, bos_token_id = EOS, None
    tokens = [*(bytes([byte]) for byte in range(256)), b"<end>"]  # noqa: RUF012
    special_token_ids = [EOS]  # noqa: RUF012

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


TOKENIZER = LLTokenizer(TokenizerWrapper(Bytes()))


def checker(whitespace: str = "compact") -> GrammarChecker:
    return GrammarChecker(ApiSettings(json_whitespace=whitespace))


async def accepts(grammar: str, text: str) -> bool:
    matcher = LLMatcher(TOKENIZER, grammar)
    assert not matcher.is_error(), matcher.get_error()
    tokens = list(text.encode())
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def schema_form(schema: Any, whitespace: str | None = None) -> Form:
    return Form("json_schema", schema, "guided_json", whitespace)


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        (Form("regex", "[a-c]{2}|ü", "regex"), ["ab", "ü"], ["a", "abc", "d", ""]),
        (Form("choice", ["yes", 'a "b"\\\n', "😀"], "x"), ["yes", 'a "b"\\\n', "😀"], ["ye", "no", "yes "]),
        (Form("grammar", 'start: "a" b?\nb: "b"', "grammar"), ["a", "ab"], ["b", "aba"]),
        (Form("grammar", 'root ::= "a" x\nx ::= [0-9]+', "ebnf"), ["a1", "a22"], ["a", "b"]),
        (schema_form({"type": "object"}), ["{}", '{"a":[1,{"b":null}]}'], ["[]", "1", "{ }", '{"a": 1}']),
        (schema_form('{"enum": ["é", 7]}'), ['"é"', "7"], ["8", '"e"']),
    ],
    ids=str,
)
async def test_a_form_accepts_exactly_what_has_it(form: Form, good: list[str], bad: list[str]) -> None:
    grammar = await checker().build(form)
    assert [await accepts(grammar, text) for text in good] == [True] * len(good)
    assert [await accepts(grammar, text) for text in bad] == [False] * len(bad)


@pytest.mark.parametrize(
    ("setting", "pattern", "good", "bad"),
    [
        ("compact", None, '{"a":1}', '{"a": 1}'),
        ("flexible", None, '{"a" :\n 1}', "{a:1}"),
        ("flexible", "", '{"a":1}', '{"a": 1}'),
        ("compact", "[ ]?", '{"a": 1}', '{"a":  1}'),
    ],
)
async def test_white_space_follows_the_setting_unless_the_request_says_otherwise(
    setting: str, pattern: str | None, good: str, bad: str
) -> None:
    grammar = await checker(setting).build(schema_form({"type": "object"}, pattern))
    assert await accepts(grammar, good)
    assert not await accepts(grammar, bad)


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (schema_form({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (schema_form({"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}), "uniqueItems"),
        (schema_form({"not": {"type": "string"}}), "not"),
        (schema_form({"type": "strin"}), "strin"),
        (schema_form({"type": "string", "format": "zip"}), "zip"),
        (schema_form({"type": "string", "pattern": "(?=a)b"}), "look-around"),
        (schema_form({"$ref": "https://example.com/x.json"}), "example.com"),
        (schema_form({"oneOf": [{"type": "integer"}, {"type": "number"}]}), "oneOf"),
        (
            schema_form(
                {"oneOf": [{"type": "integer"}, {"type": "number"}], "x-guidance": {"coerce_one_of": True}}
            ),
            "oneOf",
        ),
        (schema_form({"x-guidance": 5}), "x-guidance"),
        (schema_form("[1]"), "object"),
        (schema_form("{"), "line 1"),
        (schema_form({"enum": ["x" * MAX_GRAMMAR_BYTES]}), "larger"),
        (Form("regex", "a" * (MAX_GRAMMAR_BYTES + 1), "guided_json"), "larger"),
        (Form("regex", "(" * 60_000, "guided_json"), "regex"),
        (Form("grammar", "root ::= " + "(" * 5_000, "guided_json"), "recursion"),
        (Form("grammar", 'start: ("a"', "guided_json"), "Expected token"),
        (Form("choice", ["\ud800"], "guided_json"), "surrogate"),
    ],
    ids=lambda value: str(value)[:60],
)
async def test_a_form_that_cant_be_enforced_is_refused_with_the_field_and_the_reason(
    form: Form, reason: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await checker().build(form)
    assert caught.value.param == "guided_json"
    assert reason in caught.value.message
    assert len(caught.value.message) < 1000


async def test_a_grammar_without_end_is_given_up() -> None:
    doubled = "\n".join(f"A{number}: A{number + 1} A{number + 1}" for number in range(40))
    with pytest.raises(InvalidRequest, match="too big"):
        await checker().build(Form("grammar", f'start: A0\n{doubled}\nA40: "a"', "grammar"))


async def test_the_event_loop_goes_on_while_a_grammar_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    is_let_go = threading.Event()
    monkeypatch.setattr(grammars, "fault_of", lambda grammar: None if is_let_go.wait(10) else "stuck")
    task = asyncio.create_task(checker().build(schema_form({"type": "object"})))
    await asyncio.sleep(0)
    is_let_go.set()
    assert json.loads(await task)


async def test_a_grammar_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    monkeypatch.setattr(grammars, "fault_of", checked.append)
    monkeypatch.setattr(grammars, "MAX_NUM_CHECKED", 2)
    one = checker()
    for word in ("a", "b", "a", "c", "b", "a"):
        await one.build(Form("choice", [word], "guided_choice"))
    assert [text[-2] for text in checked] == ["a", "b", "c", "a"]


def chain_of_references(length: int) -> dict[str, Any]:
    definitions = {f"d{number}": {"$ref": f"#/$defs/d{number + 1}"} for number in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": definitions | {f"d{length}": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (Form("json_schema", chain_of_references(2_500), "f"), "references"),
        (Form("grammar", "start: a0\n" + "".join(f"a{n}: a{n + 1}\n" for n in range(4_000)), "f"), "lines"),
        (Form("grammar", 'root ::= "a" | ' + '"b" ' * 4_000, "f"), "GBNF"),
    ],
)
async def test_a_grammar_that_would_end_or_stop_the_process_is_refused(form: Form, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        await GrammarChecker(ApiSettings()).build(form)


async def test_blank_lines_of_a_grammar_do_not_count() -> None:
    text = 'root ::= "a"' + "\n" * 60_000 + 'x ::= "b"'
    assert await GrammarChecker(ApiSettings()).build(Form("grammar", text, "f"))
