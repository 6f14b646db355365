"""Chooses each step's batch: all decodes, and as many prompt tokens as the step's time allows."""

import itertools
from collections import deque
from collections.abc import Sequence as Items

from worker.engine.block_manager import BlockManager
from worker.engine.capacity import Capacity
from worker.engine.ports import Adapters
from worker.engine.sequence import (
    Batch,
    Sampled,
    SampledToken,
    ScheduledSequence,
    Sequence,
    SequenceStatus,
)
from worker.engine.step_pace import Chunk, StepPace

MIN_CHUNK_TOKENS = 16
"""Minimum size of a chunk of the longest-waiting prompt, which thus makes progress even on a slow device."""


class Scheduler:
    """Continuous batching: sequences join and leave the running batch at any step.

    If no block is free, the newest running sequence is preempted: its blocks are freed, and the sequence is
    computed again later. The cache must hold at least one sequence of maximum length.
    """

    def __init__(
        self,
        blocks: BlockManager,
        pace: StepPace,
        *,
        max_batch_size: int,
        max_prefill_tokens: int,
        adapters: Adapters,
    ) -> None:
        self._blocks = blocks
        self._adapters = adapters
        self._pace = pace
        self._capacity = Capacity(max_batch_size)
        self._max_prefill_tokens = max_prefill_tokens
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._isolated: str | None = None
        """Id of the isolated request, or None. If an id is set, no sequence runs until `run_isolated`."""
        self._may_run_isolated = False

    @property
    def max_num_sequences(self) -> int:
        """Maximum number of sequences that may run at once now. Safe to read from any thread."""
        return self._capacity.num_sequences

    @property
    def has_work(self) -> bool:
        """False if there is no sequence, or if all sequences wait while their adapters are read from disk."""
        is_loading = self._adapters.is_loading
        return bool(self._running) or any(not is_loading(seq.adapter_name) for seq in self._waiting)

    @property
    def num_blocks_in_use(self) -> int:
        """Number of cache blocks in the block tables of sequences."""
        return self._blocks.num_blocks - self._blocks.num_free_blocks

    def add(self, seq: Sequence) -> None:
        """Appends a sequence to the waiting sequences."""
        self._waiting.append(seq)

    def requests_waiting_for(self, adapter_name: str) -> list[str]:
        """Returns the ids of the requests that wait for an adapter, in the order in which they wait."""
        return list(
            dict.fromkeys(seq.request_id for seq in self._waiting if seq.adapter_name == adapter_name)
        )

    def isolate(self, request_id: str | None) -> None:
        """Isolates a request: none runs until `run_isolated`, then only this one. None ends the isolation."""
        self._isolated = request_id
        self._may_run_isolated = False

    def run_isolated(self) -> None:
        """Lets the isolated request run; preempts all others, to free their blocks and adapter slots."""
        self._may_run_isolated = True
        for seq in [seq for seq in reversed(self._running) if self._must_wait(seq)]:
            self._preempt(seq)

    def finish(self, seq: Sequence) -> None:
        """Removes a running or waiting sequence, and frees its blocks.

        Isolation ends with the last sequence of the isolated request.
        """
        (self._running if seq.status is SequenceStatus.RUNNING else self._waiting).remove(seq)
        self._blocks.free(seq)
        seq.status = SequenceStatus.FINISHED
        if seq.request_id == self._isolated:
            others = itertools.chain(self._running, self._waiting)
            self._isolated = self._isolated if any(not self._must_wait(other) for other in others) else None

    def shrink(self) -> None:
        """Lets fewer sequences run for a while, after a step ran out of memory; preempts the newest ones."""
        self._capacity.shrink(len(self._running))
        for seq in self._running[: self.max_num_sequences - 1 : -1]:
            self._preempt(seq)

    def schedule(self) -> Batch:
        """Returns the next batch; it is empty if all sequences wait for adapters or for `run_isolated`."""
        self._pace.start_step()
        if self._isolated is not None and not self._may_run_isolated:
            return []
        decodes = self._schedule_decode()
        return decodes + self._schedule_prefill(self._pace.prefill_ms(len(decodes)))

    def postprocess(self, batch: Batch, sampled: Items[Sampled]) -> list[tuple[Sequence, Sampled]]:
        """Records the computed tokens of a step, and appends the sampled tokens to their sequences.

        `sampled` has an entry for each sequence of the batch that samples a token. The result has these
        sequences with their entries. If an entry is an error, the caller must end the sequence.
        """
        chunks = [_chunk(item.seq, item.num_tokens) for item in batch if item.num_tokens > 1]
        self._pace.record(len(batch) - len(chunks), chunks)
        self._capacity.count_step()
        sampling = [scheduled.seq for scheduled in batch if scheduled.samples]
        for seq, num_tokens in batch:
            seq.num_computed_tokens += num_tokens
            # Blocks are published only now: if the step failed, other sequences would reuse invalid blocks.
            self._blocks.publish(seq, num_tokens)
        drawn = list(zip(sampling, sampled, strict=True))
        for seq, token in drawn:
            if isinstance(token, SampledToken):
                seq.token_ids.append(token.token_id)
            else:
                self._blocks.withdraw(seq)
        return drawn

    def _schedule_decode(self) -> list[ScheduledSequence]:
        batch: list[ScheduledSequence] = []
        for seq in [seq for seq in self._running if seq.num_uncomputed_tokens == 1]:
            while seq.status is SequenceStatus.RUNNING and not self._blocks.can_allocate(seq, 1):
                self._preempt(self._running[-1])
            if seq.status is SequenceStatus.RUNNING:
                self._blocks.allocate(seq, 1)
                batch.append(ScheduledSequence(seq, 1))
        return batch

    def _must_wait(self, seq: Sequence) -> bool:
        """True if a request is isolated and the sequence belongs to another request."""
        return self._isolated is not None and seq.request_id != self._isolated

    def _ready(self, prompts: Items[Sequence]) -> list[Sequence]:
        """Returns the waiting sequences that may run now; `prompts` are the running sequences in prefill.

        If an adapter is not resident, its sequences wait, and the adapter is read if a slot can be freed.
        While a prompt is not in the cache, only its first choice may run, and its other choices wait.
        """
        in_use = {seq.adapter_name for seq in self._running}
        computed = {seq.prompt_key for seq in prompts}
        ready: list[Sequence] = []
        for seq in self._waiting:
            if self._must_wait(seq) or not self._adapters.bring(seq.adapter_name, in_use):
                continue
            in_use.add(seq.adapter_name)
            if not self._blocks.has_prompt(seq):
                if seq.prompt_key in computed:
                    continue
                computed.add(seq.prompt_key)
            ready.append(seq)
        return ready

    def _fit(self, seq: Sequence, num_ms: float, max_num_tokens: int, min_num_tokens: int = 0) -> int:
        """Returns how many tokens fit into `num_ms`, but between `min_num_tokens` and `max_num_tokens`."""
        num_tokens = max(min_num_tokens, self._pace.num_tokens(num_ms, seq.num_computed_tokens))
        return int(min(seq.num_uncomputed_tokens, max_num_tokens, num_tokens))

    def _schedule_prefill(self, num_ms: float) -> list[ScheduledSequence]:
        """Divides a step's prefill time: half for the longest-waiting prompt, half for the shortest prompts.

        A short prompt thus soon overtakes long ones. A long prompt takes at most twice as long as alone.
        """
        prompts = [seq for seq in self._running if seq.num_uncomputed_tokens > 1]
        if self._waiting:
            prompts += self._ready(prompts)[: max(0, self.max_num_sequences - len(self._running))]
        # If newer prompts were admitted while the first lacks blocks, the first could wait forever.
        if not (num_ms and prompts and self._admit(prompts[0])):
            return []
        longest_waiting, *others = prompts
        reserved = self._fit(longest_waiting, num_ms / 2, -(-self._max_prefill_tokens // 2))
        reserved_ms = self._pace.chunk_ms(_chunk(longest_waiting, reserved))
        left_ms, left = num_ms - reserved_ms, self._max_prefill_tokens - reserved
        batch: list[ScheduledSequence] = []
        for seq in sorted(others, key=lambda seq: seq.num_uncomputed_tokens):
            if not (left_ms > 0 and left > 0 and self._admit(seq)):
                continue
            if num_tokens := self._fit(seq, left_ms, left):
                batch.append(ScheduledSequence(seq, num_tokens))
                left_ms -= self._pace.chunk_ms(_chunk(seq, num_tokens))
                left -= num_tokens
        num_tokens = self._fit(longest_waiting, reserved_ms + left_ms, reserved + left, MIN_CHUNK_TOKENS)
        return [ScheduledSequence(longest_waiting, num_tokens), *batch]

    def _admit(self, seq: Sequence) -> bool:
        """Makes a waiting sequence run if the cache has blocks for all of its tokens; returns True if so."""
        if seq.status is SequenceStatus.RUNNING:
            return True
        self._blocks.reuse_prefix(seq)
        if not self._blocks.can_allocate(seq, seq.num_uncomputed_tokens):
            self._blocks.free(seq)
            return False
        if seq.num_cached_tokens is None:
            seq.num_cached_tokens = seq.num_computed_tokens
        self._blocks.allocate(seq, seq.num_uncomputed_tokens)
        self._waiting.remove(seq)
        seq.status = SequenceStatus.RUNNING
        self._running.append(seq)
        return True

    def _preempt(self, seq: Sequence) -> None:
        self._running.remove(seq)
        self._blocks.free(seq)
        seq.status = SequenceStatus.WAITING
        self._waiting.appendleft(seq)


def _chunk(seq: Sequence, num_tokens: int) -> Chunk:
    """Returns the chunk of the next `num_tokens` tokens of a sequence."""
    return Chunk(num_tokens, seq.num_computed_tokens)
