"""The bytes of single tokens, for tokenizers of every kind."""

import random

import pytest
from transformers import PreTrainedTokenizerFast

from tests.tokenizers import KINDS, QWEN, SPECIAL, wrap
from worker.model.token_pieces import TokenPieces

TEXTS = ["the hen", "a  b", "\u00e9\U0001f600 the\n", "\u4f60\u597d"]


def pieces_of(kind: str) -> tuple[PreTrainedTokenizerFast, TokenPieces]:
    backend = wrap(KINDS[kind](), QWEN)
    return backend, TokenPieces(backend)


@pytest.mark.parametrize("kind", ["byte-level BPE", "SentencePiece BPE"])
@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_an_answers_tokens_are_its_text(kind: str, text: str) -> None:
    backend, pieces = pieces_of(kind)
    ids = backend.encode(text, add_special_tokens=False)
    # A decoder of a SentencePiece vocabulary drops the space that begins a text.
    assert b"".join(map(pieces.bytes_of, ids)).removeprefix(b" ").decode() == backend.decode(ids)


def test_a_part_of_a_character_is_not_replaced() -> None:
    backend, pieces = pieces_of("byte-level BPE")
    ids = backend.encode("\U0001f600", add_special_tokens=False)
    assert [pieces.bytes_of(token_id) for token_id in ids] == [b"\xf0", b"\x9f", b"\x98", b"\x80"]


@pytest.mark.parametrize("kind", KINDS)
def test_control_tokens_have_their_text_and_unknown_ids_none(kind: str) -> None:
    backend, pieces = pieces_of(kind)
    for text in (*SPECIAL, "<think>"):
        assert pieces.bytes_of(backend.convert_tokens_to_ids(text)) == text.encode()
    assert pieces.bytes_of(10**6) == b""


@pytest.mark.parametrize("kind", KINDS)
def test_every_id_has_bytes_and_the_same_each_time(kind: str) -> None:
    backend, pieces = pieces_of(kind)
    ids = list(range(len(backend))) * 2
    random.Random(1).shuffle(ids)
    found: dict[int, bytes] = {}
    for token_id in ids:
        assert pieces.bytes_of(token_id) == found.setdefault(token_id, pieces.bytes_of(token_id))
    assert all(found.values())


def test_words_of_a_sentencepiece_vocabulary_begin_with_a_space() -> None:
    backend, pieces = pieces_of("Unigram")
    assert pieces.bytes_of(backend.convert_tokens_to_ids("\u2581the")) == b" the"
