"""The prefix cache: which blocks requests share, and which are taken first."""

from shared.messages import SamplingParams
from tests.block_checks import check_blocks
from worker.engine.block_manager import BlockManager
from worker.engine.sequence import Sequence

BLOCK_SIZE = 4


def make_sequence(token_ids: list[int], version: str | None = None, name: str | None = None) -> Sequence:
    return Sequence(
        "r", 0, name, SamplingParams(), list(token_ids), len(token_ids), 1, adapter_version=version
    )


def compute(blocks: BlockManager, seq: Sequence) -> int:
    """Computes all tokens of a new sequence as a step would; how many of them the cache had."""
    blocks.reuse_prefix(seq)
    num_cached_tokens = seq.num_computed_tokens
    num_tokens = seq.num_uncomputed_tokens
    assert blocks.can_allocate(seq, num_tokens)
    blocks.allocate(seq, num_tokens)
    seq.num_computed_tokens += num_tokens
    blocks.publish(seq, num_tokens)
    return num_cached_tokens


def compute_and_free(blocks: BlockManager, *arguments: object) -> int:
    seq = make_sequence(*arguments)  # type: ignore[arg-type]
    num_cached_tokens = compute(blocks, seq)
    blocks.free(seq)
    check_blocks(blocks)
    return num_cached_tokens


def test_sequences_share_the_full_blocks_of_what_they_begin_with() -> None:
    blocks = BlockManager(16, BLOCK_SIZE)
    first, second = make_sequence([1, 2, 3, 4, 5, 6, 7, 8, 9]), make_sequence([1, 2, 3, 4, 5, 6, 7, 8, 10])
    assert (compute(blocks, first), compute(blocks, second)) == (0, 8)
    assert first.block_table[:2] == second.block_table[:2]
    assert first.block_table[2] != second.block_table[2]
    check_blocks(blocks, [first, second])


def test_a_block_that_is_not_full_is_never_shared() -> None:
    blocks = BlockManager(16, BLOCK_SIZE)
    assert compute_and_free(blocks, [1, 2, 3, 4, 5, 6]) == 0
    assert compute_and_free(blocks, [1, 2, 3, 4, 5, 6, 7, 8]) == 4


def test_the_last_token_is_computed_even_if_its_block_is_cached() -> None:
    blocks = BlockManager(16, BLOCK_SIZE)
    assert compute_and_free(blocks, [1, 2, 3, 4, 5, 6, 7, 8]) == 0
    assert compute_and_free(blocks, [1, 2, 3, 4, 5, 6, 7, 8]) == 4
    assert compute_and_free(blocks, [1, 2, 3, 4, 5, 6, 7, 8, 9]) == 8


def test_equal_tokens_behind_different_beginnings_are_not_shared() -> None:
    blocks = BlockManager(16, BLOCK_SIZE)
    compute_and_free(blocks, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert compute_and_free(blocks, [1, 2, 3, 0, 5, 6, 7, 8, 9]) == 0
    assert compute_and_free(blocks, [5, 6, 7, 8, 9]) == 0


def test_a_prefix_belongs_to_a_version_of_an_adapter_or_to_the_base() -> None:
    blocks = BlockManager(32, BLOCK_SIZE)
    tokens = [1, 2, 3, 4, 5]
    assert compute_and_free(blocks, tokens) == 0
    assert compute_and_free(blocks, tokens, "v1", "mine") == 0
    assert compute_and_free(blocks, tokens, "v2", "mine") == 0, "the adapter was replaced"
    assert compute_and_free(blocks, tokens) == 4
    assert compute_and_free(blocks, tokens, "v1", "the same weights by another name") == 4


def test_the_least_recently_used_prefix_is_taken_first() -> None:
    blocks = BlockManager(3, BLOCK_SIZE)
    compute_and_free(blocks, [1, 1, 1, 1])
    compute_and_free(blocks, [2, 2, 2, 2])
    assert compute_and_free(blocks, [1, 1, 1, 1, 9]) == 4, "now the most recent"
    compute_and_free(blocks, [3, 3, 3, 3, 9])
    assert compute_and_free(blocks, [1, 1, 1, 1, 9]) == 4
    assert compute_and_free(blocks, [2, 2, 2, 2, 9]) == 0


def test_the_end_of_a_prefix_is_taken_before_its_beginning() -> None:
    blocks = BlockManager(3, BLOCK_SIZE)
    compute_and_free(blocks, [1, 1, 1, 1, 2, 2, 2, 2, 9])
    compute_and_free(blocks, [3, 3, 3, 3, 9])
    assert compute_and_free(blocks, [1, 1, 1, 1, 2, 2, 2, 2, 9]) == 4


def test_blocks_that_cannot_be_found_are_taken_before_those_that_can() -> None:
    blocks = BlockManager(4, BLOCK_SIZE)
    compute_and_free(blocks, [1, 2, 3, 4, 5])
    for token in range(10, 20):
        compute_and_free(blocks, [token])
    assert compute_and_free(blocks, [1, 2, 3, 4, 5]) == 4


def test_a_shared_block_stays_until_its_last_user_has_left() -> None:
    blocks = BlockManager(3, BLOCK_SIZE)
    first, second = make_sequence([1, 2, 3, 4, 5]), make_sequence([1, 2, 3, 4, 6])
    compute(blocks, first)
    compute(blocks, second)
    blocks.free(first)
    check_blocks(blocks, [second])
    assert blocks.num_free_blocks == 1
    blocks.free(second)
    check_blocks(blocks)
    assert blocks.num_free_blocks == 3


def test_what_two_sequences_computed_beside_each_other_is_found_once() -> None:
    blocks = BlockManager(8, BLOCK_SIZE)
    twins = [make_sequence([1, 2, 3, 4, 5]) for _ in range(2)]
    for seq in twins:
        blocks.allocate(seq, 5)
    for seq in twins:
        seq.num_computed_tokens = 5
        blocks.publish(seq, 5)
        check_blocks(blocks, twins)
    blocks.free(twins[0])
    check_blocks(blocks, twins[1:])
    assert compute_and_free_beside(blocks, twins[1], [1, 2, 3, 4, 6]) == 4


def compute_and_free_beside(blocks: BlockManager, other: Sequence, token_ids: list[int]) -> int:
    seq = make_sequence(token_ids)
    num_cached_tokens = compute(blocks, seq)
    check_blocks(blocks, [other, seq])
    blocks.free(seq)
    return num_cached_tokens


def test_withdrawn_blocks_are_found_by_nobody_and_stay_with_who_has_them() -> None:
    blocks = BlockManager(8, BLOCK_SIZE)
    broken, sharer = make_sequence([1, 2, 3, 4, 5]), make_sequence([1, 2, 3, 4, 6])
    compute(blocks, broken)
    compute(blocks, sharer)
    blocks.withdraw(broken)
    blocks.free(broken)
    check_blocks(blocks, [sharer])
    assert len(sharer.block_table) == 2
    assert compute_and_free_beside(blocks, sharer, [1, 2, 3, 4, 7]) == 0


def test_without_a_prefix_cache_nothing_is_shared() -> None:
    blocks = BlockManager(16, BLOCK_SIZE, shares_prefixes=False)
    compute_and_free(blocks, [1, 2, 3, 4, 5])
    assert compute_and_free(blocks, [1, 2, 3, 4, 5]) == 0


def salted(**fields: str) -> Sequence:
    seq = make_sequence([1, 2, 3, 4, 5])
    for name, value in fields.items():
        setattr(seq, name, value)
    return seq


def test_tenants_and_salts_share_nothing_with_each_other_or_with_requests_without() -> None:
    blocks = BlockManager(32, BLOCK_SIZE)
    owners = [
        {},
        {"tenant": "alice"},
        {"tenant": "bob"},
        {"cache_salt": "alice"},
        {"tenant": "alice", "cache_salt": "bob"},
        {"tenant": "alic", "cache_salt": "ebob"},
        {"adapter_version": "alice"},
    ]
    assert [compute(blocks, salted(**owner)) for owner in owners] == [0] * len(owners)
    assert [compute(blocks, salted(**owner)) for owner in owners] == [4] * len(owners)


def test_a_cache_that_tenants_share_is_still_apart_by_salt() -> None:
    blocks = BlockManager(32, BLOCK_SIZE, shares_between_tenants=True)
    assert compute(blocks, salted(tenant="alice")) == 0
    assert compute(blocks, salted(tenant="bob")) == 4
    assert compute(blocks, salted(tenant="bob", cache_salt="mine")) == 0
    assert compute(blocks, salted(tenant="alice", cache_salt="mine")) == 4
