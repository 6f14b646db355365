from collections.abc import Callable, Sequence
from functools import cache

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from worker.engine.detokenizer import REPLACEMENT, Detokenizer

calmly = settings(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
"""A busy machine fails no test, and nothing is left on disk."""

SPECIAL = "<|end|>"
WORDS = ["▁", "▁Hello", "▁wor", "ld", "a", "▁a", ",", "é", REPLACEMENT, SPECIAL]


@cache
def byte_level() -> tokenizers.Tokenizer:
    """A tokenizer like GPT-2's and Llama 3's: a character beyond ASCII is several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("ð", "Ł"), ("Ġ", "a"), ("ä", "½")]
    vocab = {word: n for n, word in enumerate([SPECIAL, *alphabet, *("".join(pair) for pair in merges)])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([SPECIAL])
    return tokenizer


@cache
def byte_fallback() -> tokenizers.Tokenizer:
    """A tokenizer like Llama 2's: words with ▁ for a space, and bytes for what the vocabulary lacks."""
    vocab = {word: n for n, word in enumerate([*(f"<0x{byte:02X}>" for byte in range(256)), *WORDS])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    tokenizer.add_special_tokens([SPECIAL])
    return tokenizer


@cache
def metaspace() -> tokenizers.Tokenizer:
    """A tokenizer like T5's: the decoder itself removes the first token's space."""
    vocab = {word: n for n, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([SPECIAL])
    return tokenizer


KINDS = {"byte level": byte_level, "byte fallback": byte_fallback, "metaspace": metaspace}


def decoder(kind: str) -> Callable[..., str]:
    return lambda ids: KINDS[kind]().decode(list(ids), skip_special_tokens=True)


def released(kind: str, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(decoder(kind))
    return [detokenizer.add(token_id) for token_id in ids]


def bytes_as_tokens(text: str) -> list[int]:
    return [byte_fallback().token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]


def test_an_emoji_comes_out_whole_with_its_last_byte() -> None:
    ids = byte_level().encode("a😀b").ids
    assert len(ids) > 4
    assert [text for text in released("byte level", ids) if text] == ["a", "😀", "b"]
    assert [text for text in released("byte fallback", bytes_as_tokens("a😀b")) if text] == ["a", "😀", "b"]


def test_a_half_character_at_the_end_is_dropped() -> None:
    ids = byte_level().encode("né").ids
    assert "".join(released("byte level", ids[:-1])) == "n"


def test_spaces_between_words_stay() -> None:
    vocab = byte_fallback().get_vocab()
    words = ["▁Hello", ",", "▁wor", "ld", "▁", "▁a", "▁a"]
    assert released("byte fallback", [vocab[word] for word in words]) == [
        "Hello", ",", " wor", "ld", " ", " a", " a",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["byte fallback", "metaspace"])
def test_a_skipped_special_token_swallows_no_space(kind: str) -> None:
    vocab = KINDS[kind]().get_vocab()
    ids = [vocab[word] for word in ("▁a", SPECIAL, "▁a", SPECIAL, SPECIAL, "▁a")]
    assert "".join(released(kind, ids)) == "a a a"


def test_a_run_of_characters_in_single_bytes_comes_out_one_by_one() -> None:
    texts = released("byte fallback", bytes_as_tokens("你好😀é"))
    assert [text for text in texts if text] == ["你", "好", "😀", "é"]


def test_bytes_that_never_become_a_character_come_out_once_a_character_follows() -> None:
    vocab = byte_fallback().get_vocab()
    assert released("byte fallback", [0xFF, 0xFE, vocab["a"]]) == ["", "", f"{REPLACEMENT * 2}a"]


@calmly
@given(st.data(), st.sampled_from(sorted(KINDS)))
def test_released_text_is_a_prefix_of_the_whole_text(data: st.DataObject, kind: str) -> None:
    ids = data.draw(st.lists(st.integers(0, KINDS[kind]().get_vocab_size() - 1), max_size=30))
    whole = decoder(kind)(ids)
    if kind == "byte fallback" and REPLACEMENT in whole:
        # This decoder takes valid characters back where bytes that are not valid touch them.
        return
    text = "".join(released(kind, ids))
    assert whole.startswith(text)
    assert not whole[len(text) :].strip(REPLACEMENT)


@calmly
@given(st.text(max_size=20))
def test_any_text_arrives_whole(text: str) -> None:
    text = text.rstrip(REPLACEMENT)
    assert "".join(released("byte level", byte_level().encode(text).ids)) == text
    assert "".join(released("byte fallback", bytes_as_tokens("x" + text))) == "x" + text


@calmly
@given(st.lists(st.integers(0, 255), max_size=24))
def test_no_byte_sequence_of_a_fallback_tokenizer_takes_text_back_or_fails(ids: list[int]) -> None:
    words = ["a", *(f"<0x{byte:02X}>" for byte in ids), "a"]
    vocab = byte_fallback().get_vocab()
    text = "".join(released("byte fallback", [vocab[word] for word in words]))
    assert text.startswith("a")
    assert text.endswith("a")


class CountingDecoder:
    """A decoder that counts the tokens which it decodes."""

    def __init__(self, kind: str) -> None:
        self._decode = decoder(kind)
        self.num_tokens = 0

    def __call__(self, ids: Sequence[int]) -> str:
        self.num_tokens += len(ids)
        return self._decode(ids)


def silent(kind: str) -> Callable[[int], bool]:
    return lambda token_id: KINDS[kind]().id_to_token(token_id) in (None, SPECIAL)


def ids_of(kind: str, words: str) -> list[int]:
    """Ids of words; `UNKNOWN` is an id beyond the vocabulary."""
    vocab = KINDS[kind]().get_vocab()
    return [vocab.get(word, 99_999) for word in words.split()]


REPEATED = [
    ("byte level", SPECIAL),
    ("byte level", "UNKNOWN"),
    ("byte level", "Ģ"),  # a lone continuation byte
    ("byte level", "ð"),  # the first of four bytes
    ("byte level", "ðŁ"),
    ("byte level", "ðŁ ĺ"),
    ("byte level", f"Ģ {SPECIAL}"),
    ("byte level", "ÿ Ģ ð"),
    ("byte fallback", SPECIAL),
    ("byte fallback", "UNKNOWN"),
    ("byte fallback", "<0x80>"),
    ("byte fallback", "<0xF0>"),
    ("byte fallback", "<0xE4> <0xBD>"),
    ("byte fallback", "<0xFF> <0xE4> <0xBD> <0xA0>"),
    ("byte fallback", REPLACEMENT),
    ("metaspace", SPECIAL),
    ("metaspace", REPLACEMENT),
]


@pytest.mark.parametrize("tells_silent", [True, False])
@pytest.mark.parametrize("before", ["", "a"])
@pytest.mark.parametrize(("kind", "words"), REPEATED, ids=str)
def test_tokens_that_never_become_text_cost_the_same_at_any_length(
    kind: str, words: str, before: str, tells_silent: bool
) -> None:
    ids = [*ids_of(kind, before), *ids_of(kind, words) * 200]
    count = CountingDecoder(kind)
    detokenizer = Detokenizer(count, silent(kind)) if tells_silent else Detokenizer(count)
    text = "".join(detokenizer.add(token_id) for token_id in ids)
    assert count.num_tokens <= 50 * len(ids)
    assert text == decoder(kind)(ids).rstrip(REPLACEMENT)
    last = ids_of(kind, "a")
    assert text + detokenizer.add(*last) == decoder(kind)([*ids, *last])


@calmly
@given(st.data(), st.sampled_from(["byte level", "metaspace"]))
def test_long_runs_without_text_change_nothing_in_the_text_after_them(data: st.DataObject, kind: str) -> None:
    few = data.draw(st.lists(st.integers(0, KINDS[kind]().get_vocab_size() - 1), min_size=1, max_size=4))
    runs = data.draw(st.lists(st.tuples(st.sampled_from(few), st.sampled_from([1, 2, 3, 30])), max_size=12))
    ids = [token_id for token_id, length in runs for _ in range(length)]
    detokenizer = Detokenizer(decoder(kind))
    text = "".join(detokenizer.add(token_id) for token_id in ids)
    assert text == decoder(kind)(ids).rstrip(REPLACEMENT)


@calmly
@given(st.lists(st.tuples(st.integers(0, 255), st.sampled_from([1, 2, 30])), max_size=10))
def test_a_run_of_bytes_that_begins_invalid_stays_so_however_long_it_is(
    runs: list[tuple[int, int]],
) -> None:
    ids = [0x80, *(byte for byte, length in runs for _ in range(length)), *ids_of("byte fallback", "a")]
    detokenizer = Detokenizer(decoder("byte fallback"))
    assert "".join(map(detokenizer.add, ids)) == decoder("byte fallback")(ids)
