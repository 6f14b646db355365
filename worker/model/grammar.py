"""Follows sequences through the grammars of structured output, and computes which tokens may come next.

The library llguidance compiles a grammar for a tokenizer, once for all requests with this pair. A matcher is
a copy of the compiled grammar that follows one sequence. The state of a matcher depends only on the
sequence's output tokens. A worker can therefore rebuild the matcher after a preemption, or after the death of
another worker.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par

from shared.control_groups import num_usable_cores
from shared.errors import GenerationFailed, InvalidRequest, LorelayError, UnsupportedParameter
from shared.grammars import excess_of, parser_limits, reason_in
from shared.logs import fields
from worker.engine.sequence import Sequence
from worker.engine.served_models import ServedModels
from worker.engine.tokenizer_port import Tokenizer

logger = logging.getLogger(__name__)

MAX_NUM_COMPILED = 512
"""Maximum number of compiled grammars that are kept, most of which take less than 100 KB."""
_BITS = 32


class Masks(NamedTuple):
    """The tokens that the grammars of some rows allow next."""

    rows: list[int]
    allowed: npt.NDArray[np.int32]
    """(len(rows), vocab / 32): bit t % 32 of word t / 32 is 1 if token t is allowed."""
    errors: dict[int, LorelayError]
    """Errors of rows whose grammar can't be followed any further."""


@dataclass(slots=True)
class _Follower:
    """A matcher, and the number of the sequence's output tokens that it has followed."""

    matcher: LLMatcher
    num_followed: int = 0


class Grammars:
    """The compiled grammars of a worker, and the matchers of its sequences.

    `compile` may be called from any thread, `masks` only from the engine's.
    """

    def __init__(self, served: ServedModels, vocab_size: int) -> None:
        """Prepares the tokenizers of all models, which takes about a second for a large vocabulary.

        `vocab_size`: number of tokens for which the model computes logits; tokenizers may have fewer.
        """
        self._served = served
        self._vocab_size = vocab_size
        self._tokenizers: dict[Tokenizer, LLTokenizer | None] = {}
        """Each tokenizer in llguidance's form; None for those that llguidance refuses."""
        self._compiled: OrderedDict[tuple[Tokenizer, str], LLMatcher] = OrderedDict()
        self._lock = threading.Lock()
        self._followers: WeakKeyDictionary[Sequence, _Follower] = WeakKeyDictionary()
        self._executor = LLExecutor(num_usable_cores())
        # llguidance holds Python's lock during all of this, so it must not happen while requests run.
        for model in served:
            if model.tokenizer not in self._tokenizers:
                self._tokenizers[model.tokenizer] = _prepared(model.tokenizer, vocab_size)

    def compile(self, grammar: str, tokenizer: Tokenizer) -> LLMatcher:
        """Returns a grammar compiled for a tokenizer, of which matchers are copies.

        Raises:
            InvalidRequest: the grammar can't be compiled, or not for this tokenizer.
        """
        key = tokenizer, grammar
        with self._lock:
            if compiled := self._compiled.get(key):
                self._compiled.move_to_end(key)
                return compiled
        prepared = self._tokenizers.get(tokenizer)
        if prepared is None:
            raise UnsupportedParameter("The model's tokenizer can't be used with a grammar or JSON schema.")
        if excess := excess_of(grammar):
            raise InvalidRequest(f"The grammar can't be compiled: {excess}")
        compiled = LLMatcher(prepared, grammar, log_level=0, limits=parser_limits())
        if compiled.is_error():
            raise InvalidRequest(f"The grammar can't be compiled: {reason_in(compiled.get_error())}")
        with self._lock:
            self._compiled[key] = compiled
            while len(self._compiled) > MAX_NUM_COMPILED:
                self._compiled.popitem(last=False)
        return compiled

    def masks(self, seqs: Items[Sequence]) -> Masks | None:
        """Returns which tokens may follow each sequence; None if no sequence has a grammar."""
        constrained = [(row, seq) for row, seq in enumerate(seqs) if seq.sampling.grammar]
        if not constrained:
            return None
        errors: dict[int, LorelayError] = {}
        matchers: dict[int, LLMatcher] = {}
        for row, seq in constrained:
            try:
                matchers[row] = self._follow(seq)
            except LorelayError as error:
                errors[row] = error
        rows = [*matchers]
        allowed = self._fill([*matchers.values()])
        for number, row in enumerate(rows):
            if failure := _restrict(allowed[number], matchers[row], seqs[row]):
                errors[row] = failure
        return Masks(rows, allowed, errors)

    def _follow(self, seq: Sequence) -> LLMatcher:
        """Returns the sequence's matcher, after all of its output tokens."""
        follower = self._followers.get(seq)
        if follower is None:
            tokenizer = self._served.find(seq.adapter_name).tokenizer
            matcher = self.compile(seq.sampling.grammar, tokenizer).deep_copy()
            follower = self._followers[seq] = _Follower(matcher)
        new = seq.token_ids[seq.num_prompt_tokens + follower.num_followed :]
        if new and not follower.matcher.consume_tokens(new):
            raise _failure(follower.matcher)
        follower.num_followed += len(new)
        return follower.matcher

    def _fill(self, matchers: Items[LLMatcher]) -> npt.NDArray[np.int32]:
        """Computes the masks of all matchers in parallel."""
        allowed = np.zeros((len(matchers), -(-self._vocab_size // _BITS)), np.int32)
        # A single mask is not worth the wait for another thread.
        if len(matchers) == 1:
            fill_next_token_bitmask(matchers[0], allowed)
        elif matchers:
            numbered = [(matcher, number) for number, matcher in enumerate(matchers)]
            fill_next_token_bitmask_par(self._executor, numbered, allowed)
        return allowed


def _restrict(allowed: npt.NDArray[np.int32], matcher: LLMatcher, seq: Sequence) -> LorelayError | None:
    """Removes end tokens from a mask if they may not come next; returns the error of a failed matcher."""
    if matcher.is_error():
        return _failure(matcher)
    # An end token may also be an ordinary one, such as a letter. Amid a string, it would end the sequence.
    if not matcher.is_accepting():
        _ban(allowed, seq.eos_token_ids)
    elif seq.may_not_end:
        without_end = allowed.copy()
        _ban(without_end, seq.eos_token_ids)
        # Once the grammar is complete, only end tokens are left: then min_tokens can't be reached.
        if without_end.any():
            allowed[:] = without_end
    if not allowed.any():
        return GenerationFailed("The grammar allows no further token.")
    asked = seq.sampling.allowed_token_ids
    if asked and not any(_has(allowed, token_id) for token_id in asked):
        return GenerationFailed("The grammar allows none of the tokens in 'allowed_token_ids' next.")
    return None


def _has(allowed: npt.NDArray[np.int32], token_id: int) -> bool:
    word, bit = divmod(token_id, _BITS)
    return word < len(allowed) and bool(allowed[word] >> bit & 1)


def _ban(allowed: npt.NDArray[np.int32], token_ids: Iterable[int]) -> None:
    words = allowed.view(np.uint32)
    for token_id in token_ids:
        word, bit = divmod(token_id, _BITS)
        if word < len(words):
            words[word] &= ~np.uint32(1 << bit)


def _failure(matcher: LLMatcher) -> GenerationFailed:
    reason = reason_in(matcher.get_error())
    return GenerationFailed(f"The answer can't be continued by its grammar: {reason}")


def _prepared(tokenizer: Tokenizer, vocab_size: int) -> LLTokenizer | None:
    """Returns a tokenizer in llguidance's form, or None if it has a kind that llguidance does not know."""
    definition = tokenizer.definition
    if definition is None or not tokenizer.eos_token_ids:
        return None
    try:
        # All masks of a batch have one width, whatever number of tokens an adapter's tokenizer has.
        return LLTokenizer(definition, n_vocab=vocab_size, eos_token=sorted(tokenizer.eos_token_ids))
    except ValueError as error:
        logger.warning("no structured output with this tokenizer: %s", error, extra=fields("load_grammars"))
        return None
