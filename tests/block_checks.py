"""Invariants of a `BlockManager` between any two steps."""

from collections.abc import Iterable, Sequence
from copy import deepcopy

from shared.messages import SamplingParams
from worker.engine.block_manager import BlockManager
from worker.engine.sequence import Sequence as Generation


def check_blocks(blocks: BlockManager, sequences: Iterable[Generation] = ()) -> None:
    """Asserts that exactly the blocks of `sequences` are in use, and that others are forgotten when taken.

    `sequences` are all that have blocks. Copies are freed one by one; then a new sequence takes all blocks.
    """
    copies, copy = [deepcopy(seq) for seq in sequences], deepcopy(blocks)
    for seq in [*copies, None]:
        assert copy.num_free_blocks == copy.num_blocks - len({n for one in copies for n in one.block_table})
        if seq is not None:
            copy.free(seq)
    owner = _generation([0] * copy.num_blocks * copy.block_size)
    copy.allocate(owner, len(owner.token_ids))
    assert sorted(owner.block_table) == list(range(copy.num_blocks))
    for seq in copies:
        copy.reuse_prefix(seq)
        assert seq.block_table == []


def _generation(token_ids: Sequence[int]) -> Generation:
    return Generation("r", 0, None, SamplingParams(), list(token_ids), len(token_ids), 1)
