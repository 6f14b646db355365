"""Incremental detokenization, which releases only whole characters, and no part of a stop string."""

from collections.abc import Callable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""The character that decoders return for bytes that are not, or not yet, a whole UTF-8 character."""

Decode = Callable[[Sequence[int]], str]

NUM_DECISIVE_TOKENS = 4
"""Number of unreleased tokens that decide whether their bytes are the start of a character.

A UTF-8 character has at most 4 bytes. Decoders with byte fallback turn all bytes of a run into `REPLACEMENT`
if one is invalid. If no character was complete before, the invalid byte is among the first 4."""
NUM_OPEN_TOKENS = 3
"""Number of tokens at the end of a text that may still become a part of a character."""
MAX_NUM_PENDING = 16
"""Number of unreleased tokens; if there are more, those in the middle are dropped from the window."""


def _is_never_silent(token_id: int) -> bool:
    return False


class Detokenizer:
    """Turns the output tokens of one sequence into text, token by token, in constant time per token.

    The released text is always a prefix of `decode(all ids so far)`. Text that ends in `REPLACEMENT` may be
    the start of a character, so it is held back. If the sequence ends there, this text is dropped.

    `tokenizers.DecodeStream` does the same, but raises an error in a rare case: a byte-fallback tokenizer
    decodes a character differently once invalid bytes follow it. This class then keeps the text that it has
    released.
    """

    def __init__(self, decode: Decode, is_silent: Callable[[int], bool] = _is_never_silent) -> None:
        """`is_silent`: tells whether `decode` skips a token, such as a special token or an unknown id."""
        self._decode = decode
        self._is_silent = is_silent
        # The window starts with tokens whose text was released already: decoders strip the leading space of a
        # text, so if a new token were decoded alone, its leading space would be lost.
        self._window: list[int] = []
        self._num_old_tokens = 0
        """Number of tokens at the window's start whose text was released; the next release drops them."""
        self._num_released = 0
        """Number of characters of `decode(window)` that were released."""
        self._num_dropped = 0
        """Number of held-back `REPLACEMENT` characters whose tokens were dropped from the window."""

    def add(self, token_id: int) -> str:
        """Returns the text that can be released after this token: often a word, sometimes an empty string."""
        if self._is_silent(token_id):
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        whole = text.rstrip(REPLACEMENT)
        released = whole[self._num_released :]
        self._num_released = max(self._num_released, len(whole))
        if released:
            released = REPLACEMENT * self._num_dropped + released
            self._num_dropped = 0
            if len(whole) == len(text):
                self._forget_old_tokens()
        if len(self._window) > self._num_old_tokens + MAX_NUM_PENDING:
            self._shorten(text, whole)
        return released

    def _forget_old_tokens(self) -> None:
        self._window = self._window[self._num_old_tokens :]
        self._num_old_tokens = len(self._window)
        self._num_released = len(self._decode(self._window))

    def _shorten(self, text: str, whole: str) -> None:
        """Drops tokens from the middle of the window, if its whole characters (`whole`) stay the same.

        If the window kept all tokens that complete no character, each further token would take longer to
        decode.
        """
        num_first = self._num_old_tokens + NUM_DECISIVE_TOKENS
        window = self._window[:num_first] + self._window[-NUM_OPEN_TOKENS:]
        shorter = self._decode(window)
        # If a decoder made other text of fewer tokens, dropping some would change the text.
        if shorter.rstrip(REPLACEMENT) == whole and len(shorter) <= len(text):
            self._window = window
            self._num_dropped += len(text) - len(shorter)


class StopChecker:
    """Cuts a streamed text before the first stop string in it.

    The first stop string is the one that ends first. If two stop strings end at the same character, the text
    is cut before the longer one. The result does not depend on the pieces in which the text arrives. A stop
    string may contain special tokens. The text of a special token, called a mark, is compared with the stop
    strings, but never released.
    """

    def __init__(self, stop: tuple[str, ...], *, includes_stop: bool = False) -> None:
        """`includes_stop`: true if the text is cut after the stop string, and not before it."""
        self._includes_stop = includes_stop
        self._stop = tuple(word for word in stop if word)
        self._held = ""
        """Text that may be the start of a stop string, marks included."""
        self._marks: list[tuple[int, int]] = []
        """Start and end of each mark within the held text."""

    def add(self, text: str, mark: str = "") -> tuple[str, bool]:
        """Returns the text that may be released now, and True if a stop string ends this text.

        A piece of text that may be the start of a stop string is held back until the following text shows
        whether it is. `mark` is the text of a special token that follows `text`, or empty.
        """
        if not self._stop:
            return text, False
        text = self._held + text
        if mark:
            self._marks.append((len(text), len(text) + len(mark)))
            text += mark
        found = [(start + len(word), start) for word in self._stop if (start := text.find(word)) >= 0]
        if found:
            end, start = min(found)
            return self._release(text, end if self._includes_stop else start, keeps=False), True
        return self._release(text, len(text) - self._num_held(text), keeps=True), False

    def flush(self) -> str:
        """Returns the held-back text; call it at the end of a sequence in which no stop string was found."""
        return self._release(self._held, len(self._held), keeps=False)

    def _release(self, text: str, num_released: int, *, keeps: bool) -> str:
        """Returns the first characters of `text` without marks; with `keeps`, holds back the rest."""
        self._held = text[num_released:] if keeps else ""
        if not self._marks:
            return text[:num_released]
        shown, begin = [], 0
        for start, end in self._marks:
            shown.append(text[begin : min(start, num_released)])
            begin = end
        shown.append(text[begin:num_released])
        later = [(max(0, start - num_released), end - num_released) for start, end in self._marks]
        self._marks = [(start, end) for start, end in later if end > 0 and keeps]
        return "".join(shown)

    def _num_held(self, text: str) -> int:
        """Returns the length of the longest suffix of `text` that is the start of a stop string."""
        longest = min(len(text), max(map(len, self._stop), default=1) - 1)
        for length in range(longest, 0, -1):
            if any(word.startswith(text[-length:]) for word in self._stop):
                return length
        return 0
