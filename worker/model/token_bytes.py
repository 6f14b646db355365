"""Computes the maximum number of bytes of a text per token; APIs use it to refuse prompts that are too long.

The maximum must hold for every text, because the API has no tokenizer. There is no maximum if a tokenizer may
drop text, or if one of its tokens can stand for any number of characters.
"""

from collections.abc import Iterable
from typing import Any

from shared.text_size import ORDINARY_BYTES

BYTES = range(256)
NORMAL_FORM_SHRINK = 4
"""Maximum factor by which NFC, NFD, NFKC or NFKD shortens UTF-8, found by trying all characters."""
_NORMAL_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
_KEEPING = ("ByteLevel", "Metaspace", "Digits")
"""Pre-tokenizers that never drop a character. A `Split` or `Punctuation` drops what it is told to remove."""


def max_token_bytes(state: dict[str, Any]) -> int:
    """Returns the maximum number of ordinary bytes (`shared.text_size`) per token; 0 if there is none.

    `state`: a tokenizer as `tokenizer.json` describes it.
    """
    steps = list(_steps(state.get("pre_tokenizer"), "pretokenizers"))
    added = state.get("added_tokens") or []
    shrink = _shrink(state.get("normalizer"))
    # A token with `lstrip` or `rstrip` takes any number of spaces beside it.
    if not shrink or not all(map(_keeps_all, steps)) or any(_strips(token) for token in added):
        return 0
    model = state["model"]
    words = [word[0] if isinstance(word, list) else word for word in model.get("vocab", ())]
    is_byte_level = any(step["type"] == "ByteLevel" for step in steps)
    if model["type"] == "BPE" and is_byte_level and _ordinary_letters() <= set(words):
        longest = max(map(len, words))
    elif model["type"] in ("BPE", "Unigram") and model.get("byte_fallback") and _has_bytes(words):
        longest = max(len(word.encode()) for word in words)
    else:
        return 0
    return max([longest, *(len(token["content"].encode()) for token in added)]) * shrink


def _steps(part: dict[str, Any] | None, name: str) -> Iterable[dict[str, Any]]:
    """Yields the steps of a normalizer or pre-tokenizer, which may be nested sequences."""
    if part is None:
        return
    if part["type"] != "Sequence":
        yield part
        return
    for step in part[name]:
        yield from _steps(step, name)


def _shrink(normalizer: dict[str, Any] | None) -> int:
    """Returns the maximum factor by which a normalizer shortens a text; 0 if there is no maximum."""
    shrink = 1
    for step in _steps(normalizer, "normalizers"):
        if step["type"] in _NORMAL_FORMS:
            shrink *= NORMAL_FORM_SHRINK
        elif step["type"] == "Replace":
            old = step["pattern"].get("String")
            if old is None or len(step["content"].encode()) < len(old.encode()):
                return 0
        elif step["type"] != "Prepend":
            return 0
    return shrink


def _keeps_all(step: dict[str, Any]) -> bool:
    if step["type"] in ("Split", "Punctuation"):
        return bool(step.get("behavior") != "Removed")
    return step["type"] in _KEEPING


def _strips(token: dict[str, Any]) -> bool:
    return bool(token.get("lstrip") or token.get("rstrip"))


def byte_letters() -> dict[int, str]:
    """Returns the character that stands for each byte in byte-level vocabularies such as GPT-2's."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in BYTES if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    return letters | {byte: chr(0x100 + number) for number, byte in enumerate(others)}


def _ordinary_letters() -> set[str]:
    letters = byte_letters()
    return {letters[byte] for byte in ORDINARY_BYTES}


def _has_bytes(words: Iterable[str]) -> bool:
    return {f"<0x{byte:02X}>" for byte in BYTES} <= set(words)
