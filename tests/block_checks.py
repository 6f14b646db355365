"""The invariants of a `BlockManager` between any two steps."""

from collections import Counter
from collections.abc import Iterable

from worker.engine.block_manager import BlockManager
from worker.engine.sequence import Sequence


def check_blocks(blocks: BlockManager, sequences: Iterable[Sequence] = ()) -> None:
    """Asserts that each block is free or counted once per block table, and found only by its own key.

    `sequences` are all that have blocks.
    """
    num_users = Counter(block for seq in sequences for block in seq.block_table)
    assert blocks._num_users == [num_users[block] for block in range(blocks.num_blocks)]
    assert set(blocks._free) == {block for block in range(blocks.num_blocks) if not num_users[block]}
    assert blocks._published == {key: block for block, key in enumerate(blocks._keys) if key is not None}
