"""Decides what the next step runs: decode for all, then prefill in chunks under a token budget."""

from collections import deque
from collections.abc import Sequence as Items

from worker.block_manager import BlockManager
from worker.sequence import Batch, ScheduledSequence, Sequence, SequenceStatus


class Scheduler:
    """Continuous batching: sequences join and leave the running batch at any step.

    When blocks run out, the newest running sequence gives its own back and is computed again later.
    The cache must hold at least one sequence of full length.
    """

    def __init__(self, blocks: BlockManager, *, max_batch_size: int, max_prefill_tokens: int) -> None:
        self._blocks = blocks
        self._max_batch_size = max_batch_size
        self._max_prefill_tokens = max_prefill_tokens
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._lone: Sequence | None = None

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self._waiting or self._running)

    @property
    def num_blocks_in_use(self) -> int:
        """Cache blocks that sequences hold."""
        return self._blocks.num_blocks - self._blocks.num_free_blocks

    def add(self, seq: Sequence) -> None:
        """Queues a sequence behind those that wait already."""
        self._waiting.append(seq)

    def isolate(self, seq: Sequence | None) -> None:
        """From now on the steps of this sequence, added before, run without the others; None ends that."""
        self._lone = seq

    def finish(self, seq: Sequence) -> None:
        """Takes a sequence out, wherever it is, and frees its blocks."""
        if seq is self._lone:
            self._lone = None
        (self._running if seq.status is SequenceStatus.RUNNING else self._waiting).remove(seq)
        self._blocks.free(seq)
        seq.status = SequenceStatus.FINISHED

    def schedule(self) -> Batch:
        """The next step's batch; empty only when there is no work."""
        if self._lone is not None:
            return self._schedule_alone(self._lone)
        batch = self._schedule_decode()
        budget = self._max_prefill_tokens
        for seq in [seq for seq in self._running if seq.num_uncomputed_tokens > 1]:
            # No room for it: what it waits for must not go to a newer one, or both could wait for ever.
            budget -= self._schedule_prefill(seq, budget, batch) or budget
        while self._waiting and budget > 0 and len(self._running) < self._max_batch_size:
            seq = self._waiting[0]
            self._blocks.reuse_prefix(seq)
            num_cached_tokens = seq.num_computed_tokens
            num_tokens = self._schedule_prefill(seq, budget, batch)
            if num_tokens == 0:
                self._blocks.free(seq)
                break
            budget -= num_tokens
            self._start(seq, num_cached_tokens)
        return batch

    def postprocess(self, batch: Batch, token_ids: Items[int | None]) -> list[tuple[Sequence, int | None]]:
        """Records a step: computed tokens, and the sampled token of each sequence that reached its end.

        `token_ids` has one entry per scheduled sequence that `samples`; None stands for logits that gave no
        token, which is left to the caller to end.
        """
        sampling = [scheduled.seq for scheduled in batch if scheduled.samples]
        for scheduled in batch:
            scheduled.seq.num_computed_tokens += scheduled.num_tokens
            # Not before: what a failed step left in its blocks must not be found.
            self._blocks.publish(scheduled.seq, scheduled.num_tokens)
        sampled = list(zip(sampling, token_ids, strict=True))
        for seq, token_id in sampled:
            if token_id is None:
                self._blocks.withdraw(seq)
            else:
                seq.token_ids.append(token_id)
        return sampled

    def _schedule_decode(self) -> list[ScheduledSequence]:
        batch: list[ScheduledSequence] = []
        for seq in [seq for seq in self._running if seq.num_uncomputed_tokens == 1]:
            while seq.status is SequenceStatus.RUNNING and not self._blocks.can_allocate(seq, 1):
                self._preempt(self._running[-1])
            if seq.status is SequenceStatus.RUNNING:
                self._blocks.allocate(seq, 1)
                batch.append(ScheduledSequence(seq, 1))
        return batch

    def _schedule_alone(self, seq: Sequence) -> list[ScheduledSequence]:
        """The next step of one sequence; the others keep their blocks as long as there is room."""
        batch: list[ScheduledSequence] = []
        while not self._schedule_prefill(seq, self._max_prefill_tokens, batch):
            self._preempt(next(other for other in reversed(self._running) if other is not seq))
        if seq.status is SequenceStatus.WAITING:
            self._start(seq, num_cached_tokens=0)
        return batch

    def _schedule_prefill(self, seq: Sequence, budget: int, batch: list[ScheduledSequence]) -> int:
        """Adds the next chunk of a prompt, as much as budget and blocks allow; its number of tokens."""
        num_tokens = min(seq.num_uncomputed_tokens, budget)
        if num_tokens <= 0 or not self._blocks.can_allocate(seq, num_tokens):
            return 0
        self._blocks.allocate(seq, num_tokens)
        batch.append(ScheduledSequence(seq, num_tokens))
        return num_tokens

    def _start(self, seq: Sequence, num_cached_tokens: int) -> None:
        self._waiting.remove(seq)
        seq.status = SequenceStatus.RUNNING
        self._running.append(seq)
        if seq.num_cached_tokens is None:
            seq.num_cached_tokens = num_cached_tokens

    def _preempt(self, seq: Sequence) -> None:
        self._running.remove(seq)
        self._blocks.free(seq)
        seq.status = SequenceStatus.WAITING
        self._waiting.appendleft(seq)
