"""Encodes rendered chats, in which control tokens count only if the chat template wrote them."""

import json
import re
import secrets
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from worker.model.marked_text import CLIENT

_FILLER = "\N{OBJECT REPLACEMENT CHARACTER}"
_IN_BRACKETS = re.compile(r"<[^ ]+>|\[[^ ]+\]|\{[^ ]+\}")
_HTML = re.compile(
    r"</?(?:table|caption|thead|tbody|tfoot|tr|th|td|ul|ol|li|h[1-6]|blockquote|strong|em|b|i|u|s|sub|sup|code|a|p|br|div|span)>"
)
"""HTML tags that are ordinary words of Gemma's vocabulary."""
_NO_COPY = "it contains a control token, which this model's tokenizer can't encode as text; leave it out"
_NO_WORDS = {
    "model": {"type": "WordLevel", "vocab": {"\ue002": 0}, "unk_token": "\ue002"},
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": None,
}
"""Replaced parts of a tokenizer's state, with which the tokenizer finds only added tokens."""


def control_tokens(backend: FastTokenizer, template: str) -> dict[int, str]:
    """Returns ids and texts of a tokenizer's control tokens.

    All special tokens are control tokens. Another added token is a control token if it is enclosed in
    brackets or occurs in the template. All other added tokens, such as runs of spaces or words, are ordinary
    vocabulary.
    """
    return {
        token_id: token.content
        for token_id, token in backend.get_added_tokens_decoder().items()
        if token.content.strip() and (token.special or _is_markup(token.content, template))
    }


def _is_markup(content: str, template: str) -> bool:
    if _IN_BRACKETS.fullmatch(content):
        return not _HTML.fullmatch(content)
    return content in template and not content.isalnum() and any(map(str.isalnum, content))


class ControlTokens:
    """Encodes text that a client wrote in part. Methods may be called from any thread."""

    def __init__(self, backend: FastTokenizer, template: str) -> None:
        """`backend`: a tokenizer, which must not change later. `template`: the text of its chat templates."""
        self._backend = backend
        self._texts = control_tokens(backend, template)
        known = backend.get_added_tokens_decoder()
        self._normalized = {token_id for token_id in self._texts if known[token_id].normalized}
        self._lock = threading.Lock()
        self._copy: _Copy | None = None

    def encode(self, text: str, mask: bytes, *, add_special_tokens: bool = False) -> list[int]:
        """Returns the token ids of a text.

        `mask` tells which characters a client wrote. If a client wrote any character of a control token, this
        token is encoded as ordinary text. If there is no such token, the tokenizer itself encodes the text.

        Raises:
            ValueError: a client wrote a control token, but this tokenizer can't encode it as text.
        """
        encoding = _encode(self._backend, text, add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        if not any(mask.find(CLIENT, start, end) >= 0 for _, start, end in self._found(encoding, text)):
            return ids
        copy = self._copied()
        encoding = _encode(
            copy.backend, copy.with_stand_ins(text, mask), add_special_tokens=add_special_tokens
        )
        return [copy.own_ids.get(token_id, token_id) for token_id in encoding.ids]

    def _found(self, encoding: Any, text: str) -> Iterator[tuple[int, int, int]]:
        """Yields id, start and end of the control tokens in an encoded text."""
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            # The unknown token also stands for any text that the vocabulary lacks.
            if token_id in self._texts and (
                self._texts[token_id] in text[start:end] or token_id in self._normalized
            ):
                yield token_id, start, end

    def _copied(self) -> "_Copy":
        """Returns the copy of the tokenizer, which is made at first use: it takes a second, and memory."""
        with self._lock:
            if self._copy is None:
                self._copy = _make_copy(self._backend, self._texts)
            return self._copy


class _Copy(NamedTuple):
    """A tokenizer that finds control tokens only by their stand-ins: texts that no client can guess."""

    backend: FastTokenizer
    own_ids: dict[int, int]
    """Id of each added token in the copy → its id in the original tokenizer."""
    finder: FastTokenizer
    """A tokenizer with the original's added tokens, and no words: it finds control tokens quickly."""
    by_found: dict[int, str]
    """Id of each control token in `finder` → its stand-in."""

    def with_stand_ins(self, text: str, mask: bytes) -> str:
        """Replaces the control tokens that the template wrote by their stand-ins."""
        # White space stays, because a control token may take the spaces beside it.
        own = "".join(
            _FILLER if is_client and not char.isspace() else char
            for char, is_client in zip(text, mask, strict=True)
        )
        encoding = _encode(self.finder, own, add_special_tokens=False)
        pieces, position = [], 0
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id in self.by_found:
                pieces += [text[position:start], self.by_found[token_id]]
                position = end
        return "".join([*pieces, text[position:]])


def _make_copy(backend: FastTokenizer, texts: dict[int, str]) -> _Copy:
    """Copies a tokenizer. The copy finds only stand-ins of control tokens, not their `texts`.

    Raises:
        ValueError: the tokenizer can't be copied.
    """
    nonce = secrets.token_hex(8)
    stand_ins = {token_id: f"\ue000{nonce}{number:05}\ue001" for number, token_id in enumerate(texts)}
    # The Rust library raises plain exceptions.
    try:
        state = json.loads(backend.to_str())
        finder = FastTokenizer.from_str(json.dumps({**state, **_NO_WORDS}))
        removed = set(texts.values())
        state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in removed]
        _rename(state["model"], removed)
        copy = FastTokenizer.from_str(json.dumps(state))
    except Exception as error:
        raise ValueError(f"{_NO_COPY}: {error}") from error
    known = backend.get_added_tokens_decoder()
    copy.add_special_tokens(
        [
            AddedToken(
                text,
                lstrip=known[token_id].lstrip,
                rstrip=known[token_id].rstrip,
                normalized=False,
                special=True,
            )
            for token_id, text in stand_ins.items()
        ]
    )
    ids = backend.get_vocab() | {text: token_id for token_id, text in stand_ins.items()}
    own_ids = {token_id: ids[token.content] for token_id, token in copy.get_added_tokens_decoder().items()}
    moved = {token_id for token_id, own_id in own_ids.items() if token_id != own_id}
    if not moved.isdisjoint(copy.get_vocab(with_added_tokens=False).values()):
        raise ValueError(f"{_NO_COPY}: its vocabulary has gaps")
    found_ids = finder.get_vocab()
    by_found = {found_ids[texts[token_id]]: text for token_id, text in stand_ins.items()}
    return _Copy(copy, own_ids, finder, by_found)


def _rename(model: dict[str, Any], removed: set[str]) -> None:
    """Renames the `removed` control tokens in a vocabulary, so that no text contains them."""

    def other(word: str) -> str:
        return f"\ue000{word}\ue001" if word in removed else word

    if isinstance(model["vocab"], list):
        # Unigram: any word of the vocabulary can be found in text, and words of control tokens are likely.
        model["vocab"] = [[other(word), score] for word, score in model["vocab"]]
        return
    model["vocab"] = {other(word): token_id for word, token_id in model["vocab"].items()}
    if model.get("unk_token"):
        model["unk_token"] = other(model["unk_token"])
    if "merges" in model:
        pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if not {"".join(pair), *pair} & removed]


MAX_SHORT_LENGTH = 4096
"""Number of characters that are encoded within about 15 ms."""


def _encode(backend: Any, text: str, *, add_special_tokens: bool) -> Any:
    """Encodes a text as `backend.encode` does, but other threads of Python run meanwhile.

    `encode` would stop the engine's thread, and so all streams, for a second per 300 KB of text. For a short
    text, `encode` takes less time, because it wakes no other threads.
    """
    if len(text) <= MAX_SHORT_LENGTH:
        return backend.encode(text, add_special_tokens=add_special_tokens)
    return backend.encode_batch([text], add_special_tokens=add_special_tokens)[0]
