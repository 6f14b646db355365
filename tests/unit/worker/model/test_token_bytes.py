"""The bound on the bytes of a token: it holds for every text, or there is none."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from shared.text_size import num_ordinary_bytes
from tests.tokenizers import CHATML, LLAMA2, MACRO, QWEN, byte_level, sentencepiece_bpe, unigram, wordpiece
from worker.model.token_bytes import max_token_bytes
from worker.model.tokenizer import Tokenizer as OurTokenizer


def bound_of(backend: Tokenizer) -> int:
    return max_token_bytes(json.loads(backend.to_str()))


def composing() -> Tokenizer:
    backend = byte_level()
    backend.normalizer = normalizers.NFC()
    return backend


def isolating() -> Tokenizer:
    backend = byte_level()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "isolated"), pre_tokenizers.ByteLevel(use_regex=False)]
    )
    return backend


BOUNDED = {
    "bytes": byte_level(),
    "bytes, composed": composing(),
    "bytes, isolated": isolating(),
    "fallback": sentencepiece_bpe(),
}
BOUNDS = {name: bound_of(backend) for name, backend in BOUNDED.items()}


def test_the_bound_is_the_longest_token_times_what_the_normalizer_shortens() -> None:
    assert {
        "bytes": 4,
        "bytes, composed": 16,
        "bytes, isolated": 4,
        "fallback": max(len(word.encode()) for word in sentencepiece_bpe().get_vocab()),
    } == BOUNDS


@pytest.mark.parametrize("name", BOUNDED)
@given(st.text(max_size=60) | st.text("the \n\u1100\u1161\u11a8\u0390\x04\U000e0100", max_size=60))
def test_no_text_has_more_bytes_for_its_tokens_than_the_bound(name: str, text: str) -> None:
    num_tokens = len(BOUNDED[name].encode(text, add_special_tokens=False).ids)
    assert num_ordinary_bytes(text) <= BOUNDS[name] * num_tokens


def changed(**parts: Any) -> Tokenizer:
    backend = byte_level()
    for name, part in parts.items():
        setattr(backend, name, part)
    return backend


def with_stripping_token() -> Tokenizer:
    backend = byte_level()
    backend.add_tokens([AddedToken("<mask>", lstrip=True)])
    return backend


@pytest.mark.parametrize(
    "backend",
    [
        unigram(),
        wordpiece(),
        changed(normalizer=normalizers.Strip()),
        changed(normalizer=normalizers.Replace("aaaa", "b")),
        changed(normalizer=normalizers.Lowercase()),
        changed(pre_tokenizer=pre_tokenizers.Whitespace()),
        changed(
            pre_tokenizer=pre_tokenizers.Sequence(
                [pre_tokenizers.Split("x", "removed"), pre_tokenizers.ByteLevel()]
            )
        ),
        with_stripping_token(),
    ],
    ids=[
        "unknown words",
        "unknown parts",
        "strip",
        "replace",
        "lower case",
        "white space",
        "removed",
        "stripping token",
    ],
)
def test_a_tokenizer_that_may_drop_text_has_no_bound(backend: Tokenizer) -> None:
    assert bound_of(backend) == 0


def chat_bound(template: str) -> int:
    backend = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(), bos_token="<s>", eos_token="</s>", chat_template=template
    )
    return OurTokenizer(backend, frozenset()).max_token_bytes


@pytest.mark.parametrize("template", [CHATML, QWEN, LLAMA2, MACRO])
def test_a_template_that_keeps_what_users_say_keeps_the_bound(template: str) -> None:
    assert chat_bound(template) > 0


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[-1].content }}",
        "{% for m in messages %}{{ m.content[:20] }}{% endfor %}",
        "{% for m in messages %}{{ m.content.split() | join(' ') }}{% endfor %}",
        "{{ raise_exception('no') }}",
    ],
)
def test_a_template_that_may_drop_text_has_no_bound(template: str) -> None:
    assert chat_bound(template) == 0
