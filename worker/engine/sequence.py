"""Sequences, the batch of one forward pass, and the tokens drawn from it. No tensors."""

from collections.abc import Collection, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from shared.errors import LorelayError
from shared.messages import FinishReason, SamplingParams


class OutOfDeviceMemory(Exception):
    """A step did not fit into the device's memory; nothing of it was recorded."""


class SampledToken(NamedTuple):
    """The token that a step drew for a sequence."""

    token_id: int
    logprob: float | None = None
    """Natural logarithm of its probability; None if the request did not ask for it."""
    alternatives: tuple[tuple[int, float], ...] = ()
    """The most likely token ids of this position with their logprobs, likeliest first."""


Sampled = SampledToken | LorelayError
"""The result of a step for a sequence: its token, or the error that left it without one."""


class LogitAdjustments(NamedTuple):
    """Changes that a sequence wants in its next logits, as plain data; `worker.model.logits` applies them."""

    banned: Collection[int] = ()
    """Token ids that must not be drawn."""
    bias: Mapping[int, float] = {}
    """Maps a token id to the number that is added to its logit."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token that the output has."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of a token once for each time that the output has it."""
    output_token_ids: Items[int] = ()
    """The output so far."""


class SequenceStatus(Enum):
    """WAITING for blocks or an adapter, RUNNING in the batch, or FINISHED."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """One generation: one choice for one prompt of a request.

    The KV cache holds the first `num_computed_tokens` of `token_ids`, in the blocks of `block_table`.
    """

    request_id: str
    index: int
    adapter_name: str | None
    sampling: SamplingParams
    token_ids: list[int]
    """Prompt, then output. A resumed sequence starts with the output it had already."""
    num_prompt_tokens: int
    max_tokens: int
    """Output tokens after which it ends with `length`; at least 1."""
    status: SequenceStatus = SequenceStatus.WAITING
    finish_reason: FinishReason | None = None
    num_computed_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    prompt_no: int = 0
    """Index of the request's prompt that it continues."""
    eos_token_ids: frozenset[int] = frozenset()
    """Tokens that end the sequence."""
    adapter_version: str | None = None
    """Version of the adapter whose weights fill its blocks; None for the base."""
    block_keys: list[bytes] = field(default_factory=list)
    """Keys of its full blocks, as far as computed; see `BlockManager`."""
    num_cached_tokens: int | None = None
    """Prompt tokens that the cache had when the sequence first ran; None before."""

    @property
    def prompt_key(self) -> tuple[str, int]:
        """Identifies the prompt: equal for all choices of one prompt of one request."""
        return self.request_id, self.prompt_no

    @property
    def output_token_ids(self) -> list[int]:
        """The tokens generated so far."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_output_tokens(self) -> int:
        """The number of tokens generated so far, which is also the position of the next one."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """The number of tokens that the cache lacks: 1 in decode, more in prefill."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def may_not_end(self) -> bool:
        """True while `min_tokens` forbids an end-of-sequence token or a stop string."""
        return self.num_output_tokens < self.sampling.min_tokens

    @property
    def logit_adjustments(self) -> LogitAdjustments | None:
        """The changes that it wants in its next logits; None leaves them unchanged."""
        sampling = self.sampling
        if not (self.may_not_end or sampling.adjusts_logits):
            return None
        return LogitAdjustments(
            banned=self.eos_token_ids if self.may_not_end else (),
            bias=sampling.logit_bias,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            output_token_ids=self.output_token_ids,
        )


class ScheduledSequence(NamedTuple):
    """The share of one sequence in a step: its next `num_tokens` uncomputed tokens."""

    seq: Sequence
    num_tokens: int

    @property
    def samples(self) -> bool:
        """True if this step reaches the sequence's last token, so that its logits give the next one."""
        return self.num_tokens == self.seq.num_uncomputed_tokens


Batch = Items[ScheduledSequence]
"""The sequences of one forward pass: those in decode (one token) and chunks of prefill (several)."""
