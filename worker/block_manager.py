"""Accounts for the blocks of the KV cache. No tensors: block numbers only."""

from worker.sequence import Sequence


class BlockManager:
    """Hands out the cache's blocks, `block_size` tokens each, to block tables."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free_blocks(self) -> int:
        """Blocks in no block table."""
        return len(self._free)

    def can_allocate(self, seq: Sequence, num_tokens: int) -> bool:
        """Whether the sequence's next `num_tokens` tokens find room."""
        return self._num_missing_blocks(seq, num_tokens) <= len(self._free)

    def allocate(self, seq: Sequence, num_tokens: int) -> None:
        """Extends the block table for the next `num_tokens` tokens; ask `can_allocate` first."""
        for _ in range(self._num_missing_blocks(seq, num_tokens)):
            seq.block_table.append(self._free.pop())

    def free(self, seq: Sequence) -> None:
        """Takes all blocks of a sequence back; its cached tokens are gone."""
        self._free.extend(reversed(seq.block_table))
        seq.block_table.clear()
        seq.num_computed_tokens = 0

    def _num_missing_blocks(self, seq: Sequence, num_tokens: int) -> int:
        num_needed = -(-(seq.num_computed_tokens + num_tokens) // self.block_size)
        return max(0, num_needed - len(seq.block_table))
