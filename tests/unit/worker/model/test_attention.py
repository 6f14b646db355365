from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from shared.messages import SamplingParams
from tests.compiled import WITH_AND_WITHOUT_KERNELS, need_kernels
from worker.engine.sequence import ScheduledSequence, Sequence
from worker.model.attention import AttentionState, attach, paged_attention
from worker.model.batch_forward import attention_metadata
from worker.model.kernels import native
from worker.model.kernels.native import AttentionOptions
from worker.model.kv_cache import PagedKVCache

torch.set_num_threads(1)

BLOCK_SIZE = 4
NUM_HEADS, NUM_KV_HEADS, KEY_DIM, VALUE_DIM = 4, 2, 6, 5
LENGTHS = (13, 6, 9)


class Layer(nn.Module):
    layer_idx = 0
    is_causal = True


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """The output for a whole sequence, (heads, length, dim) each, written out one query at a time."""
    outputs = torch.empty(query.shape[1], NUM_HEADS, VALUE_DIM, dtype=query.dtype)
    for head in range(NUM_HEADS):
        shared = head // (NUM_HEADS // NUM_KV_HEADS)
        for position in range(query.shape[1]):
            first = 0 if sliding_window is None else max(0, position + 1 - sliding_window)
            seen = slice(first, position + 1)
            scores = key[shared, seen] @ query[head, position]
            scores = scores * (KEY_DIM**-0.5 if scaling is None else scaling)
            if softcap is not None:
                scores = (scores / softcap).tanh() * softcap
            weights = scores.exp()
            sink = 0 if s_aux is None else s_aux[head].exp()
            outputs[position, head] = weights @ value[shared, seen] / (weights.sum() + sink)
    return outputs


def schedule() -> Iterator[list[tuple[int, int]]]:
    """Steps of (sequence, number of tokens): chunks of prefills beside decodes, in changing order."""
    yield [(0, 5)]
    yield [(0, 3), (1, 4)]
    yield [(1, 1), (0, 4), (2, 2)]
    yield [(2, 6), (1, 1), (0, 1)]
    yield [(2, 1)]


def make_sequences() -> list[Sequence]:
    """Three sequences whose blocks lie apart and out of order."""
    tables = [[9, 2, 7, 0], [1, 5], [8, 3, 6]]
    return [
        Sequence("r", 0, None, SamplingParams(), [0] * length, length, 1, block_table=table)
        for length, table in zip(LENGTHS, tables, strict=True)
    ]


def run_paged(
    inputs: list[tuple[Tensor, Tensor, Tensor]], *, has_kernels: bool = False, **options: Any
) -> list[Tensor]:
    if has_kernels:
        need_kernels()
    layer = Layer()
    state = AttentionState(PagedKVCache(10, BLOCK_SIZE))
    if has_kernels:
        state.use(native.new_state())
    attach(layer, state)
    sequences = make_sequences()
    outputs: list[list[Tensor]] = [[], [], []]
    for step in schedule():
        batch = [ScheduledSequence(sequences[n], count) for n, count in step]
        spans = [
            slice(item.seq.num_computed_tokens, item.seq.num_computed_tokens + item.num_tokens)
            for item in batch
        ]
        parts = [
            torch.cat([inputs[n][kind][:, span] for (n, _), span in zip(step, spans, strict=True)], dim=1)
            for kind in range(3)
        ]
        state.begin_step(attention_metadata(batch, BLOCK_SIZE, torch.device("cpu")))
        output, _ = paged_attention(layer, *(part[None] for part in parts), None, **options)
        pieces = output[0].split([count for _, count in step])
        for (n, count), piece in zip(step, pieces, strict=True):
            outputs[n].append(piece)
            sequences[n].num_computed_tokens += count
    return [torch.cat(pieces) for pieces in outputs]


def random_inputs(seed: int = 0) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [
        (draw(NUM_HEADS, n, KEY_DIM), draw(NUM_KV_HEADS, n, KEY_DIM), draw(NUM_KV_HEADS, n, VALUE_DIM))
        for n in LENGTHS
    ]


@WITH_AND_WITHOUT_KERNELS
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scaling": 0.7},
        {"sliding_window": 3, "scaling": 0.4},
        {"sliding_window": 1},
        {"softcap": 2.0},
        {"softcap": 1.5, "sliding_window": 4, "scaling": 0.9},
        {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)},
        {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64), "sliding_window": 5},
    ],
    ids=str,
)
def test_chunks_and_decodes_of_batched_sequences_equal_whole_sequences_alone(
    options: dict[str, Any], has_kernels: bool
) -> None:
    inputs = random_inputs()
    outputs = run_paged(inputs, has_kernels=has_kernels, **options)
    for output, parts in zip(outputs, inputs, strict=True):
        torch.testing.assert_close(output, reference(*parts, **options))


def test_a_sequence_does_not_feel_its_neighbours() -> None:
    inputs, others = random_inputs(), random_inputs(seed=1)
    alone = run_paged(inputs)[1]
    among_others = run_paged([others[0], inputs[1], others[2]])[1]
    torch.testing.assert_close(among_others, alone, rtol=0, atol=1e-12)


def test_what_is_not_finite_reaches_no_later_owner_of_a_block() -> None:
    key = torch.full((3, 1, 2), torch.nan)
    cache = PagedKVCache(2, 4)
    keys, values = cache.write(0, torch.tensor([0, 1, 5]), key, key * torch.inf)
    assert keys.isfinite().all()
    assert values.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 40])
@pytest.mark.parametrize("window", [None, 20])
def test_the_kernels_attend_as_pytorch_does_in_every_precision(
    head_dim: int, dtype: torch.dtype, window: int | None
) -> None:
    need_kernels()
    num_heads, num_kv_heads = 6, 2
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    num_queries = [1, 1, 100, 45]  # two decodes, two chunks
    first_positions = [10, 2, 0, 31]
    tables, num_used = [], 0
    for first, count in zip(first_positions, num_queries, strict=True):
        num_blocks = -(-(first + count) // BLOCK_SIZE)
        tables.append(torch.arange(num_used, num_used + num_blocks).flip(0))
        num_used += num_blocks
    cache = (
        draw(num_used, BLOCK_SIZE, num_kv_heads, head_dim),
        draw(num_used, BLOCK_SIZE, num_kv_heads, head_dim),
    )
    num_rows = sum(num_queries)
    query, key, value = (draw(n, num_rows, head_dim) for n in (num_heads, num_kv_heads, num_kv_heads))
    places = [
        (table, first + n)
        for table, first, count in zip(tables, first_positions, num_queries, strict=True)
        for n in range(count)
    ]
    indices = [int(table[place // BLOCK_SIZE]) * BLOCK_SIZE + place % BLOCK_SIZE for table, place in places]
    kernels = native.new_state()
    kernels.set_cache(0, *cache)
    kernels.begin_step(
        torch.tensor(indices),
        torch.arange(2),
        torch.nn.utils.rnn.pad_sequence(tables[:2], batch_first=True),
        torch.tensor(first_positions[:2]),
        torch.tensor([(2, 100, 0), (102, 45, 31)]),
        tables[2:],
    )
    options = AttentionOptions(scaling=0.3, window=window, softcap=None, sinks=None)
    output = native.attention(query[None], key[None], value[None], 0, options)[0]
    for row, (table, place) in enumerate(places):
        keys, values = (layer[table].flatten(0, 1)[: place + 1].transpose(0, 1).double() for layer in cache)
        assert torch.equal(keys[:, -1], key[:, row].double())
        seen = slice(0 if window is None else max(0, place + 1 - window), place + 1)
        expected = scaled_dot_product_attention(
            query[:, row].double().view(num_kv_heads, -1, head_dim), keys[:, seen], values[:, seen], scale=0.3
        )
        tolerance = max(4 * torch.finfo(dtype).eps, 1e-5)
        torch.testing.assert_close(
            output[row].double(), expected.flatten(0, 1), rtol=tolerance, atol=tolerance
        )


def test_what_is_not_finite_spoils_its_own_row_only_and_is_not_stored() -> None:
    need_kernels()
    inputs, spoiled = random_inputs(), random_inputs()
    for part in spoiled[1]:
        part[:, -1] = torch.nan
    plain, output = (run_paged(given, has_kernels=True) for given in (inputs, spoiled))
    assert output[1][-1].isnan().all()
    torch.testing.assert_close(output[1][:-1], plain[1][:-1])
    torch.testing.assert_close(output[2], plain[2])
    for part in spoiled[0]:
        part[:, 7] = torch.nan  # the last query of a chunk
    output = run_paged(spoiled, has_kernels=True)
    assert output[0][7].isnan().all()
    torch.testing.assert_close(output[0][:7], plain[0][:7])


def test_a_kernel_stores_what_is_not_finite_as_numbers() -> None:
    need_kernels()
    cache = (torch.zeros(2, BLOCK_SIZE, 1, 2), torch.zeros(2, BLOCK_SIZE, 1, 2))
    entry = torch.tensor([[[[torch.nan, torch.inf]]]])
    kernels = native.new_state()
    kernels.set_cache(0, *cache)
    one = torch.tensor([[1]])
    kernels.begin_step(torch.tensor([4]), one[0] - 1, one, one - 1, torch.empty(0, 3, dtype=torch.long), [])
    native.attention(entry, entry, -entry, 0, AttentionOptions(1.0, None, None, None))
    largest = torch.finfo(torch.float32).max
    assert cache[0][1, 0, 0].tolist() == [0, largest]
    assert cache[1][1, 0, 0].tolist() == [0, -largest]


def test_the_cache_keeps_each_layers_own_shape_when_it_grows() -> None:
    cache = PagedKVCache(2, 4)
    indices = torch.tensor([0, 7])
    cache.write(0, indices, torch.ones(2, 1, 6), torch.ones(2, 1, 5))
    cache.write(3, indices, torch.ones(2, 2, 4).double(), torch.ones(2, 2, 4).double())
    assert cache.num_bytes_per_block == 4 * ((6 + 5) * 4 + 2 * (8 + 8) * 4)
    cache.resize(5)
    new = torch.ones(1, 2, 4).double()
    keys, values = cache.write(3, torch.tensor([19]), new, new)
    assert keys.shape == values.shape == (5, 4, 2, 4)
    assert keys.sum() == 8


@pytest.mark.parametrize(
    "options", [{"position_bias": torch.zeros(1)}, {"dropout": 0.1}, {"is_causal": False}, {"unheard_of": 1}]
)
def test_what_would_change_the_result_and_is_not_known_is_an_error(options: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError, match="Layer"):
        run_paged(random_inputs(), **options)


def test_a_mask_of_the_models_own_is_an_error() -> None:
    layer = Layer()
    part = torch.zeros(1, 2, 3, 4)
    with pytest.raises(NotImplementedError, match="mask"):
        paged_attention(layer, part, part, part, torch.zeros(3, 3))


def test_what_transformers_passes_without_meaning_is_ignored() -> None:
    inputs = random_inputs()
    options = {"dropout": 0.0, "position_ids": torch.zeros(1), "use_cache": False, "cache_position": None}
    plain = run_paged(inputs)
    for output, expected in zip(run_paged(inputs, is_causal=True, **options), plain, strict=True):
        assert torch.equal(output, expected)
