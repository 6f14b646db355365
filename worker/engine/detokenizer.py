"""Incremental detokenization: whole characters only, and no part of a stop string. No tensors."""

from collections.abc import Callable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""The character that decoders return for bytes that are no character, or not yet."""

Decode = Callable[[Sequence[int]], str]


class Detokenizer:
    """Turns one sequence's output tokens into text, one at a time.

    All text released so far is a prefix of `decode(all ids so far)`. Text that ends in `REPLACEMENT` may be
    the start of a character, so it is held back; at the end of a sequence it is dropped.

    `tokenizers.DecodeStream` does the same, but raises if a byte-fallback tokenizer withdraws a character
    because invalid bytes follow it; this class keeps the released text.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        # Tokens since the last release but one: a decoder treats the first token of a text specially (it
        # strips its space), so new tokens are only ever decoded behind ones that have given text.
        self._window: list[int] = []
        self._num_old_tokens = 0
        self._num_released = 0
        """The number of characters of `decode(window)` that were released."""

    def add(self, token_id: int) -> str:
        """The text that this token releases: often a word, sometimes nothing."""
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
    """Ends a text before the first stop string that completes in it.

    The result does not depend on how the text is cut into pieces. If two stop strings complete at the same
    character, the longer one counts, because it starts earlier.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = tuple(word for word in stop if word)
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """The text that may be shown now, and true if a stop string was met, which ends the text.

        Text that may be the start of a stop string is held back until more text decides.
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
        """Returns the text held back, at the end of a sequence that met no stop string."""
        held, self._held = self._held, ""
        return held

    def _num_held(self, text: str) -> int:
        """Length of the longest end of `text` that starts a stop string."""
        longest = min(len(text), max(map(len, self._stop), default=1) - 1)
        for length in range(longest, 0, -1):
            if any(word.startswith(text[-length:]) for word in self._stop):
                return length
        return 0
