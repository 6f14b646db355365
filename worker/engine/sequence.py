"""Sequences, the batch of one forward pass, and the tokens that are sampled from its logits."""

from array import array
from collections.abc import Collection, Iterable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from shared.errors import LorelayError
from shared.messages import FinishReason, SamplingParams


class OutOfDeviceMemory(Exception):
    """A step did not fit into the device's memory; none of its tokens counts as computed."""


class SampledToken(NamedTuple):
    """The token that a step sampled for a sequence."""

    token_id: int
    logprob: float | None = None
    """Natural logarithm of the token's probability; None if the request did not ask for it."""
    alternatives: tuple[tuple[int, float], ...] = ()
    """The most likely token ids at this position with their logprobs, in descending order."""


Sampled = SampledToken | LorelayError
"""A step's result for one sequence: the next token, or an error."""


class TokenCounts:
    """Counts how often each token occurs; each further token takes the same short time."""

    def __init__(self, token_ids: Iterable[int] = ()) -> None:
        self.token_ids = array("q")
        """The distinct tokens, in the order in which they first occurred."""
        self.counts = array("q")
        """The number of occurrences of each entry of `token_ids`."""
        self.num_counted = 0
        """The sum of `counts`."""
        self._index: dict[int, int] = {}
        self.add(token_ids)

    def add(self, token_ids: Iterable[int]) -> None:
        """Counts further tokens."""
        for token_id in token_ids:
            index = self._index.setdefault(token_id, len(self.token_ids))
            if index == len(self.token_ids):
                self.token_ids.append(token_id)
                self.counts.append(0)
            self.counts[index] += 1
            self.num_counted += 1

    def find(self, token_id: int) -> int | None:
        """Returns the token's index in `token_ids`, or None if it does not occur."""
        return self._index.get(token_id)


class LogitAdjustments(NamedTuple):
    """Changes to the logits of a sequence's next token, as plain data; `worker.model.logits` applies them."""

    banned: Collection[int] = ()
    """Token ids that must not be sampled."""
    bias: Mapping[int, float] = {}
    """Maps a token id to the number that is added to its logit."""
    presence_penalty: float = 0.0
    """Number subtracted from the logit of each token that occurs in the output."""
    frequency_penalty: float = 0.0
    """Number subtracted from a token's logit for each occurrence of the token in the output."""
    repetition_penalty: float = 1.0
    """Divides positive logits of the tokens in `seen`, and multiplies negative ones."""
    seen: TokenCounts | None = None
    """The tokens of prompt and output; None without a repetition penalty."""
    allowed: Collection[int] = ()
    """The only token ids that may be sampled; empty if all may."""
    output_counts: TokenCounts | None = None
    """The tokens of the sequence's output so far, to which the penalties apply; None without penalties."""


class SequenceStatus(Enum):
    """The status of a sequence; a sequence waits for blocks, an adapter or its turn."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False, weakref_slot=True)
class Sequence:
    """One generation: one choice for one prompt of a request.

    The KV cache holds the first `num_computed_tokens` of `token_ids`, in the blocks of `block_table`.
    """

    request_id: str
    index: int
    adapter_name: str | None
    sampling: SamplingParams
    token_ids: list[int]
    """The prompt's tokens, then the generated ones; a resumed sequence starts with the log's tokens, too."""
    num_prompt_tokens: int
    max_tokens: int
    """Maximum number of output tokens, at least 1; the sequence then ends with finish reason `length`."""
    status: SequenceStatus = SequenceStatus.WAITING
    finish_reason: FinishReason | None = None
    num_computed_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    prompt_no: int = 0
    """Index of the sequence's prompt among the prompts of its request."""
    eos_token_ids: frozenset[int] = frozenset()
    """Ids of the tokens that end the sequence."""
    adapter_version: str | None = None
    """Version of the adapter that computes the sequence's keys and values; None for the base model."""
    tenant: str = ""
    """The client that sent its request; see `BlockManager` for the effect of tenant and salt."""
    cache_salt: str = ""
    block_keys: list[bytes] = field(default_factory=list)
    """Keys of the sequence's first full blocks, as far as they were computed; see `BlockManager`."""
    num_cached_tokens: int | None = None
    """Number of prompt tokens found in the prefix cache when the sequence first ran; None before that."""
    output_counts: TokenCounts = field(default_factory=TokenCounts)
    """Counts of the output tokens that `logit_adjustments` has counted so far; empty without penalties."""

    seen: TokenCounts = field(default_factory=TokenCounts)
    """Counts of the tokens of prompt and output; empty without a repetition penalty."""

    @property
    def prompt_key(self) -> tuple[str, int]:
        """Key of the prompt: equal for all choices of one prompt of one request."""
        return self.request_id, self.prompt_no

    @property
    def output_token_ids(self) -> list[int]:
        """The tokens generated so far."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_output_tokens(self) -> int:
        """Number of tokens generated so far; also the index of the next output token."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Number of tokens whose keys and values are not in the cache: 1 in decode, more in prefill."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def may_not_end(self) -> bool:
        """True while `min_tokens` forbids an end-of-sequence token or a stop string."""
        return self.num_output_tokens < self.sampling.min_tokens

    @property
    def logit_adjustments(self) -> LogitAdjustments | None:
        """Logit adjustments for the next token, or None if there are none."""
        sampling, counts = self.sampling, None
        # A grammar knows the end tokens, and decides together with `min_tokens` when they may come.
        bans_end = self.may_not_end and not sampling.grammar
        if not (bans_end or sampling.adjusts_logits):
            return None
        if sampling.presence_penalty or sampling.frequency_penalty:
            counts = self.output_counts
            counts.add(self.token_ids[self.num_prompt_tokens + counts.num_counted :])
        repeats = sampling.repetition_penalty != 1
        if repeats:
            self.seen.add(self.token_ids[self.seen.num_counted :])
        return LogitAdjustments(
            repetition_penalty=sampling.repetition_penalty,
            seen=self.seen if repeats else None,
            allowed=sampling.allowed_token_ids,
            banned=self.eos_token_ids.union(sampling.stop_token_ids) if bans_end else (),
            bias=sampling.logit_bias,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            output_counts=counts,
        )


class ScheduledSequence(NamedTuple):
    """The part of a sequence that a step computes: its next `num_tokens` uncomputed tokens."""

    seq: Sequence
    num_tokens: int

    @property
    def samples(self) -> bool:
        """True if the step computes the sequence's last token, whose logits give the next token."""
        return self.num_tokens == self.seq.num_uncomputed_tokens


Batch = Items[ScheduledSequence]
"""The sequences of one forward pass: decodes (one token each) and prompt chunks (several tokens each)."""
