"""Bookkeeping of the KV cache's blocks: which sequences use them, and which prefixes they hold."""

from array import array
from collections import OrderedDict
from hashlib import sha256

from worker.engine.sequence import Sequence


class BlockManager:
    """Hands out the cache's blocks, `block_size` tokens each, to block tables.

    Full blocks are shared between sequences that begin with the same tokens and have the same adapter
    version, tenant and salt. If tenants shared blocks, `cached_tokens` or the time to the first token would
    tell a client which prompts another client has sent.

    A block's key is the SHA-256 of its tokens and of the previous block's key; the first block's key includes
    adapter version, tenant and salt. A key thus identifies all tokens up to the end of its block. A published
    block is one that other sequences can find by its key. A block that no table uses any more keeps its
    contents and key until it is allocated again.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        shares_prefixes: bool = True,
        shares_between_tenants: bool = False,
    ) -> None:
        """With `shares_between_tenants`, all tenants share blocks, if the sequences have the same salt."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._shares_prefixes = shares_prefixes
        self._shares_between_tenants = shares_between_tenants
        self._num_users = [0] * num_blocks
        """For each block, the number of block tables that contain it."""
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        """Blocks in no block table, in the order in which they will be allocated."""
        self._keys: list[bytes | None] = [None] * num_blocks
        self._published: dict[bytes, int] = {}

    @property
    def num_free_blocks(self) -> int:
        """Number of blocks in no block table, including blocks that still hold a published prefix."""
        return len(self._free)

    def can_allocate(self, seq: Sequence, num_tokens: int) -> bool:
        """True if enough blocks are free for the sequence's next `num_tokens` tokens."""
        return self._num_missing_blocks(seq, num_tokens) <= len(self._free)

    def allocate(self, seq: Sequence, num_tokens: int) -> None:
        """Extends the block table for the next `num_tokens` tokens; ask `can_allocate` first."""
        for _ in range(self._num_missing_blocks(seq, num_tokens)):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._num_users[block] = 1
            seq.block_table.append(block)

    def free(self, seq: Sequence) -> None:
        """Frees all blocks of a sequence; published blocks can be found until they are allocated again.

        The published blocks of the sequence will be allocated again from the last to the first, because a
        block can be found only if all blocks before it can be found, too.
        """
        for block in reversed(seq.block_table):
            self._num_users[block] -= 1
            if self._num_users[block] == 0:
                self._free[block] = None
                self._free.move_to_end(block, last=self._keys[block] is not None)
        seq.block_table.clear()
        seq.num_computed_tokens = 0

    def reuse_prefix(self, seq: Sequence) -> None:
        """Fills a sequence's empty block table with the published blocks that hold its first tokens.

        Only whole blocks are reused. The last token is never reused, because it must be computed for its
        logits.
        """
        if not self._shares_prefixes:
            return
        for key in self._block_keys(seq, (len(seq.token_ids) - 1) // self.block_size):
            if key not in self._published:
                break
            block = self._published[key]
            self._free.pop(block, None)
            self._num_users[block] += 1
            seq.block_table.append(block)
        seq.num_computed_tokens = len(seq.block_table) * self.block_size

    def has_prompt(self, seq: Sequence) -> bool:
        """True if all shareable blocks of a sequence's prompt are published, or if there are none."""
        num_blocks = (seq.num_prompt_tokens - 1) // self.block_size if self._shares_prefixes else 0
        return not num_blocks or self._block_keys(seq, num_blocks)[-1] in self._published

    def publish(self, seq: Sequence, num_tokens: int) -> None:
        """Lets other sequences find the blocks that the last `num_tokens` computed tokens filled."""
        num_full, num_in_last = divmod(seq.num_computed_tokens, self.block_size)
        if num_in_last >= num_tokens or not self._shares_prefixes:
            return
        num_full_before = (seq.num_computed_tokens - num_tokens) // self.block_size
        keys = self._block_keys(seq, num_full)
        for key, block in zip(keys[num_full_before:], seq.block_table[num_full_before:num_full], strict=True):
            if key not in self._published:
                self._published[key] = block
                self._keys[block] = key

    def withdraw(self, seq: Sequence) -> None:
        """Stops other sequences from finding a sequence's blocks; blocks shared already stay shared."""
        for block in seq.block_table:
            self._forget(block)

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            del self._published[key]
            self._keys[block] = None

    def _block_keys(self, seq: Sequence, num_blocks: int) -> list[bytes]:
        """Returns the keys of a sequence's first `num_blocks` blocks, and stores them in the sequence."""
        keys = seq.block_keys
        for number in range(len(keys), num_blocks):
            token_ids = seq.token_ids[number * self.block_size : (number + 1) * self.block_size]
            before = keys[-1] if keys else self._root_key(seq)
            keys.append(sha256(before + array("q", token_ids).tobytes()).digest())
        return keys[:num_blocks]

    def _root_key(self, seq: Sequence) -> bytes:
        """Returns the key that stands for the block before a sequence's first block."""
        tenant = "" if self._shares_between_tenants else seq.tenant
        # A plain concatenation could be equal for two different triples.
        return sha256(repr((seq.adapter_version, tenant, seq.cache_salt)).encode()).digest()

    def _num_missing_blocks(self, seq: Sequence, num_tokens: int) -> int:
        num_needed = -(-(seq.num_computed_tokens + num_tokens) // self.block_size)
        return max(0, num_needed - len(seq.block_table))
