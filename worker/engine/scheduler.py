"""Decides what the next step runs: decode for all, then as much prefill as its time allows."""

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
"""Smallest chunk of the prompt that waits longest, so that it gets on however slow the device is."""


class Scheduler:
    """Continuous batching: sequences join and leave the running batch at any step.

    If blocks run out, the newest running sequence gives its own back and is computed again later. The cache
    must hold at least one sequence of full length.
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
        """The request that runs alone; nothing runs until `run_isolated`."""
        self._may_run_isolated = False

    @property
    def max_num_sequences(self) -> int:
        """The number of sequences that may run at once now. Safe to read in any thread."""
        return self._capacity.num_sequences

    @property
    def has_work(self) -> bool:
        """True if a sequence runs, or waits for anything but the reading of its adapter."""
        is_loading = self._adapters.is_loading
        return bool(self._running) or any(not is_loading(seq.adapter_name) for seq in self._waiting)

    @property
    def num_blocks_in_use(self) -> int:
        """The number of cache blocks that sequences hold."""
        return self._blocks.num_blocks - self._blocks.num_free_blocks

    def add(self, seq: Sequence) -> None:
        """Queues a sequence behind those that wait already."""
        self._waiting.append(seq)

    def requests_waiting_for(self, adapter_name: str) -> list[str]:
        """The requests that wait for an adapter, next one first."""
        return list(
            dict.fromkeys(seq.request_id for seq in self._waiting if seq.adapter_name == adapter_name)
        )

    def isolate(self, request_id: str | None) -> None:
        """Isolates an added request: nothing runs until `run_isolated`, then it alone; None ends that."""
        self._isolated = request_id
        self._may_run_isolated = False

    def run_isolated(self) -> None:
        """Lets the isolated request run; the others give their blocks and their adapters' slots back."""
        self._may_run_isolated = True
        for seq in [seq for seq in reversed(self._running) if self._must_wait(seq)]:
            self._preempt(seq)

    def finish(self, seq: Sequence) -> None:
        """Takes a sequence out, wherever it is, and frees its blocks.

        With the last one of a request its isolation ends.
        """
        (self._running if seq.status is SequenceStatus.RUNNING else self._waiting).remove(seq)
        self._blocks.free(seq)
        seq.status = SequenceStatus.FINISHED
        if seq.request_id == self._isolated:
            others = itertools.chain(self._running, self._waiting)
            self._isolated = self._isolated if any(not self._must_wait(other) for other in others) else None

    def shrink(self) -> None:
        """Lets fewer sequences run for a while, because a step did not fit into memory: the newest wait."""
        self._capacity.shrink(len(self._running))
        for seq in self._running[: self.max_num_sequences - 1 : -1]:
            self._preempt(seq)

    def schedule(self) -> Batch:
        """The next step's batch; empty if all sequences wait for their adapters, or for `run_isolated`."""
        self._pace.start_step()
        if self._isolated is not None and not self._may_run_isolated:
            return []
        decodes = self._schedule_decode()
        return decodes + self._schedule_prefill(self._pace.prefill_ms(len(decodes)))

    def postprocess(self, batch: Batch, sampled: Items[Sampled]) -> list[tuple[Sequence, Sampled]]:
        """Records a step: computed tokens, and the sampled token of each sequence that reached its end.

        `sampled` has one entry per scheduled sequence that `samples`; a sequence that got an error is left to
        the caller to end.
        """
        chunks = [_chunk(item.seq, item.num_tokens) for item in batch if item.num_tokens > 1]
        self._pace.record(len(batch) - len(chunks), chunks)
        self._capacity.count_step()
        sampling = [scheduled.seq for scheduled in batch if scheduled.samples]
        for seq, num_tokens in batch:
            seq.num_computed_tokens += num_tokens
            # Only now: if the step had failed, others would find blocks with wrong contents.
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
        """True if another request is isolated."""
        return self._isolated is not None and seq.request_id != self._isolated

    def _ready(self, prompts: Items[Sequence]) -> list[Sequence]:
        """The waiting sequences that may join the running ones, of which `prompts` are in prefill.

        Their adapters are resident; the adapters of others are brought if there are slots. If a prompt is not
        in the cache, its first choice computes it, and the other choices join once they find it there.
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
        """The number of its next tokens that a sequence can compute in `num_ms`, within these limits."""
        num_tokens = max(min_num_tokens, self._pace.num_tokens(num_ms, seq.num_computed_tokens))
        return int(min(seq.num_uncomputed_tokens, max_num_tokens, num_tokens))

    def _schedule_prefill(self, num_ms: float) -> list[ScheduledSequence]:
        """Shares the time for prompts: half for the one that waits longest, the rest for the shortest ones.

        With these shares a short prompt soon passes long ones, and no prompt takes more than twice its time.
        """
        prompts = [seq for seq in self._running if seq.num_uncomputed_tokens > 1]
        if self._waiting:
            prompts += self._ready(prompts)[: max(0, self.max_num_sequences - len(self._running))]
        # There is no room for the first one: if newer ones took the free blocks, it would wait for ever.
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
        """Lets a waiting sequence run if there is room for all of its tokens; returns true if it runs."""
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
    """The next `num_tokens` of a sequence."""
    return Chunk(num_tokens, seq.num_computed_tokens)
