"""The bytes that single tokens stand for, which answers with log probabilities contain."""

import json
import re
from typing import Any

from worker.model.token_bytes import byte_letters

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""The character that stands for a space in SentencePiece's vocabularies."""


class TokenPieces:
    """The bytes of each token of a transformers tokenizer. May be used from any thread.

    A token may be a part of a character. The joined bytes of all tokens of an output are the bytes of its
    text. But decoders of SentencePiece's vocabularies drop a space at the beginning of the text.
    """

    def __init__(self, backend: Any) -> None:
        """`backend`: a transformers tokenizer, with or without a `tokenizer.json`."""
        self._backend = backend
        self._fast: Any = getattr(backend, "backend_tokenizer", None)
        self._added = {token_id: token.content for token_id, token in backend.added_tokens_decoder.items()}
        self._steps = _decoder_steps(self._fast)
        self._bytes_of_letters = {letter: byte for byte, letter in byte_letters().items()}
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token_id: int) -> bytes:
        """Returns the bytes of a token; none for an id beyond the tokenizer's vocabulary."""
        found = self._known.get(token_id)
        if found is None:
            found = self._known[token_id] = self._compute(token_id)
        return found

    def _compute(self, token_id: int) -> bytes:
        if token_id in self._added:
            return str(self._added[token_id]).encode()
        if self._fast is None:
            return str(self._backend.decode([token_id])).encode()
        piece = self._fast.id_to_token(token_id)
        return b"" if piece is None else self._decode(token_id, piece)

    def _decode(self, token_id: int, piece: str) -> bytes:
        """Returns the bytes of an entry of the vocabulary."""
        if "ByteLevel" in self._steps:
            letters = self._bytes_of_letters
            return b"".join(
                bytes([letters[letter]]) if letter in letters else letter.encode() for letter in piece
            )
        if "ByteFallback" in self._steps and (written := _BYTE.fullmatch(piece)):
            return bytes([int(written[1], 16)])
        if self._steps & {"Metaspace", "ByteFallback", "Replace"}:
            return piece.replace(_SPACE, " ").encode()
        return str(self._backend.decode([token_id])).encode()


def _decoder_steps(fast: Any) -> frozenset[str]:
    """Returns the types of the steps in a tokenizer's decoder; an empty set if there is no decoder."""
    if fast is None or fast.decoder is None:
        return frozenset()
    state = json.loads(fast.decoder.__getstate__())
    return frozenset(step["type"] for step in state.get("decoders", [state]))
