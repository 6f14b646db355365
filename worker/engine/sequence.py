"""One generation inside the engine, and the batch that one forward pass runs. Plain Python, no tensors."""

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from enum import Enum

from shared.messages import FinishReason, SamplingParams


class OutOfDeviceMemory(Exception):
    """A step did not fit into the device's memory; nothing of it was recorded."""


class SequenceStatus(Enum):
    """WAITING for blocks, RUNNING in the batch, FINISHED."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of one request.

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
    adapter_version: str | None = None
    """Of the weights that fill its blocks; None without an adapter."""
    block_keys: list[bytes] = field(default_factory=list)
    """What its full blocks are found by, as far as known; see `BlockManager`."""
    num_cached_tokens: int | None = None
    """Prompt tokens that were not computed when it first ran, because the cache had them; None before."""

    @property
    def output_token_ids(self) -> list[int]:
        """The tokens generated so far."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_output_tokens(self) -> int:
        """How many tokens were generated so far; also the position whose token is sampled next."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens that the cache lacks: 1 while decoding, more in prefill."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def may_not_end(self) -> bool:
        """Whether `min_tokens` still forbids an end-of-sequence token or a stop string."""
        return self.num_output_tokens < self.sampling.min_tokens


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """The share of one sequence in a step: its next `num_tokens` uncomputed tokens."""

    seq: Sequence
    num_tokens: int

    @property
    def samples(self) -> bool:
        """Whether this step reaches the sequence's last token, so that its logits give the next one."""
        return self.num_tokens == self.seq.num_uncomputed_tokens


Batch = Items[ScheduledSequence]
"""What one forward runs: sequences in decode (one token) beside chunks of prefill (several)."""
