"""Incremental detokenization: releases only whole characters, and no part of a stop string. No tensors."""

from collections.abc import Callable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""The character that decoders return for bytes that are not, or not yet, a whole UTF-8 character."""

Decode = Callable[[Sequence[int]], str]


class Detokenizer:
    """Turns the output tokens of one sequence into text, token by token.

    All text released so far is a prefix of `decode(all ids so far)`. A `REPLACEMENT` at the end of the text
    may be the start of a character and is held back; if the sequence ends there, that text is dropped.

    `tokenizers.DecodeStream` does the same, but raises an error if invalid bytes after a character make a
    byte-fallback tokenizer replace the character. This class keeps the text that it has released.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        # The window starts with tokens whose text was released already: decoders strip the leading space of a
        # text, so if a new token were decoded alone, its leading space would be lost.
        self._window: list[int] = []
        self._num_old_tokens = 0
        """Number of tokens at the window's start whose text was released; the next release drops them."""
        self._num_released = 0
        """Number of characters of `decode(window)` that were released."""

    def add(self, token_id: int) -> str:
        """Returns the text that can be released after this token: often a word, sometimes an empty string."""
        self._window.append(token_id)
        text = self._decode(self._window)
        whole = text.rstrip(REPLACEMENT)
        released = whole[self._num_released :]
        self._num_released = max(self._num_released, len(whole))
        if released and len(whole) == len(text):
            self._forget_old_tokens()
        return released

    def _forget_old_tokens(self) -> None:
        self._window = self._window[self._num_old_tokens :]
        self._num_old_tokens = len(self._window)
        self._num_released = len(self._decode(self._window))


class StopChecker:
    """Cuts a streamed text before the stop string that is complete first.

    The result does not depend on the pieces in which the text arrives. If two stop strings end at the same
    character, the text is cut before the longer one, which starts earlier.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = tuple(word for word in stop if word)
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """Returns the text that may be released now, and True if a stop string ended the text.

        A piece of text that may be the start of a stop string is held back until the text after it decides.
        """
        if not self._stop:
            return text, False
        text = self._held + text
        found = [(start + len(word), start) for word in self._stop if (start := text.find(word)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        num_held = self._num_held(text)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], False

    def flush(self) -> str:
        """Returns the held-back text; call it at the end of a sequence in which no stop string was found."""
        held, self._held = self._held, ""
        return held

    def _num_held(self, text: str) -> int:
        """Returns the length of the longest suffix of `text` that is the start of a stop string."""
        longest = min(len(text), max(map(len, self._stop), default=1) - 1)
        for length in range(longest, 0, -1):
            if any(word.startswith(text[-length:]) for word in self._stop):
                return length
        return 0
