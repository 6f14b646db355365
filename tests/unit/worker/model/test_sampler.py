from collections.abc import Sequence

import numpy as np
import pytest
import torch

from shared.messages import SamplingParams
from worker.engine.sequence import LogitAdjustments, SampledToken, TokenCounts
from worker.model import sampler
from worker.model.logits import adjust
from worker.model.sampler import SamplingRow, philox, uniforms

torch.set_num_threads(1)

VOCAB = 300


def row(
    position: int = 0, choice: int = 0, adjustments: LogitAdjustments | None = None, **params: float
) -> SamplingRow:
    return SamplingRow(SamplingParams(**params), choice, position, adjustments)  # type: ignore[arg-type]


def sample(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> list[int | None]:
    """The token ids that are drawn; None for a row that gets an error."""
    drawn = sampler.sample(logits, rows)
    return [token.token_id if isinstance(token, SampledToken) else None for token in drawn]


def random_logits(num_rows: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return 2 * torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_numbers(counter: list[int], key: list[int], expected: list[int]) -> None:
    """Random123's `kat_vectors`, philox4x32 10, two of them side by side."""
    words = philox(np.array([counter, [1, 2, 3, 4]], np.uint32), np.array([key, [5, 6]], np.uint32))
    assert words[0].tolist() == expected
    swapped = philox(np.array([[1, 2, 3, 4], counter], np.uint32), np.array([[5, 6], key], np.uint32))
    assert swapped[1].tolist() == expected
    assert swapped[0].tolist() == words[1].tolist()


def test_random_numbers_are_even_and_differ_by_seed_choice_and_position() -> None:
    rows = [
        row(position, choice, seed=seed)
        for seed in (0, 1, 1 << 32, (1 << 63) - 1)
        for choice in range(5)
        for position in range(200)
    ]
    numbers = uniforms(rows)
    assert len(set(numbers.tolist())) == len(rows)
    assert 0 <= numbers.min() < 0.01
    assert 0.99 < numbers.max() < 1
    counts, _ = np.histogram(numbers, bins=10, range=(0, 1))
    assert counts.min() > 330
    assert counts.max() < 470


def test_temperature_zero_is_greedy() -> None:
    logits = random_logits(4)
    assert sample(logits, [row(temperature=0)] * 4) == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("params", [{"temperature": 1e-9}, {"top_k": 1}, {"top_p": 1e-9}, {"top_p": 0.0}])
def test_params_that_leave_one_token_are_greedy(params: dict[str, float]) -> None:
    logits = random_logits(3)
    rows = [row(position, seed=7, **params) for position in range(3)]
    assert sample(logits, rows) == logits.argmax(dim=-1).tolist()


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([[1.0, 0.0, 2.0, -torch.inf]]).expand(4000, -1)
    drawn = sample(logits, [row(position, seed=3, temperature=0.5) for position in range(4000)])
    shares = np.bincount(np.array(drawn), minlength=4) / 4000
    assert shares == pytest.approx((logits[0] / 0.5).softmax(-1).tolist(), abs=0.02)
    assert shares[3] == 0


def test_top_k_and_top_p_leave_the_likeliest() -> None:
    logits = torch.tensor([[0.1, 0.4, 0.3, 0.2]]).log().expand(2000, -1)
    positions = range(2000)
    assert set(sample(logits, [row(n, top_k=2) for n in positions])) == {1, 2}
    # 0.4 + 0.3 is the first sum to reach 0.65.
    assert set(sample(logits, [row(n, top_p=0.65) for n in positions])) == {1, 2}
    assert set(sample(logits, [row(n, top_p=0.75) for n in positions])) == {1, 2, 3}
    # The three likeliest have 0.9 in all, of which 0.4 + 0.3 is more than 0.75.
    assert set(sample(logits, [row(n, top_k=3, top_p=0.75) for n in positions])) == {1, 2}
    shares = np.bincount(np.array(sample(logits, [row(n, top_k=2) for n in positions]))) / 2000
    assert shares[1] == pytest.approx(4 / 7, abs=0.04)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_row_draws_the_same_token_alone_and_in_any_batch(dtype: torch.dtype) -> None:
    logits = random_logits(8, dtype=dtype)
    kinds: list[dict[str, float]] = [{}, {"top_k": 5}, {"top_p": 0.8}, {"temperature": 0}]
    rows = [row(n, n % 3, seed=n * 1000, **kinds[n % 4]) for n in range(8)]
    together = sample(logits, rows)
    assert [sample(logits[n : n + 1], [rows[n]])[0] for n in range(8)] == together
    assert sample(logits.flip(0), rows[::-1]) == together[::-1]


def test_a_resumed_sequence_draws_what_it_would_have_drawn() -> None:
    logits = random_logits(20)
    rows = [row(position, seed=11) for position in range(20)]
    assert sample(logits[12:], rows[12:]) == sample(logits, rows)[12:]


def test_banned_tokens_are_not_picked() -> None:
    logits = random_logits(3)
    best = logits.argmax(dim=-1).tolist()
    runner_up = logits.topk(2).indices[:, 1].tolist()
    rows = [
        row(temperature=0, adjustments=LogitAdjustments(banned=(best[0],))),
        row(temperature=0),
        row(top_k=1, adjustments=LogitAdjustments(banned=(best[2], 0))),
    ]
    assert sample(logits, rows) == [runner_up[0], best[1], runner_up[2]]


def test_a_bias_makes_a_token_more_or_less_likely_but_does_not_lift_a_ban() -> None:
    logits = random_logits(3)
    best = logits.argmax(dim=-1).tolist()
    runner_up = logits.topk(2).indices[:, 1].tolist()
    adjustments = [
        LogitAdjustments(bias={7: 100.0}),
        LogitAdjustments(bias={best[1]: -100.0}),
        LogitAdjustments(bias={7: 100.0}, banned=(7,)),
    ]
    assert sample(logits, [row(temperature=0, adjustments=one) for one in adjustments]) == [
        7,
        runner_up[1],
        best[2],
    ]


def test_penalties_count_the_tokens_of_the_output_so_far() -> None:
    logits = torch.tensor([[1.0, 0.9, 0.5, 0.0]]).expand(4, -1)
    output = TokenCounts((0, 0, 1, 2))
    adjustments = [
        LogitAdjustments(presence_penalty=0.2),
        LogitAdjustments(presence_penalty=1.1, output_counts=output),
        LogitAdjustments(frequency_penalty=0.2, output_counts=output),
        LogitAdjustments(frequency_penalty=-0.2, output_counts=output),
    ]
    assert sample(logits, [row(temperature=0, adjustments=one) for one in adjustments]) == [0, 3, 1, 0]


def test_a_penalty_a_bias_and_a_ban_of_one_token_add_up() -> None:
    logits = torch.zeros(3, 4)
    output = TokenCounts((0, 0, 1))
    adjustments = [
        LogitAdjustments(
            bias={0: 2.0, 3: 0.5}, presence_penalty=0.25, frequency_penalty=0.5, output_counts=output
        ),
        None,
        LogitAdjustments(bias={0: 2.0}, banned=(0, 2), frequency_penalty=-1.0, output_counts=output),
    ]
    assert adjust(logits, adjustments).tolist() == [
        [0.75, -0.75, 0.0, 0.5],
        [0.0, 0.0, 0.0, 0.0],
        [float("-inf"), 1.0, float("-inf"), 0.0],
    ]


def test_the_callers_logits_stay_as_they_are() -> None:
    logits = random_logits(2)
    before = logits.clone()
    sample(logits, [row(adjustments=LogitAdjustments(banned=(1, 2))), row(top_k=3)])
    assert torch.equal(logits, before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("params", [{"temperature": 0}, {}, {"top_k": 5}])
def test_a_row_that_is_not_finite_fails_alone(bad: float, params: dict[str, float]) -> None:
    logits = random_logits(3)
    rows = [row(n, seed=n, **params) for n in range(3)]
    expected = sample(logits, rows)
    logits[1, 17] = bad
    assert sample(logits, rows) == [expected[0], None, expected[2]]


def test_no_rows_give_no_tokens() -> None:
    assert sample(torch.zeros(0, VOCAB), []) == []


def peaked_logits(num_rows: int, vocab: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Logits like a language model's: few tokens have nearly all of the mass, in bfloat16 many are equal."""
    generator = torch.Generator().manual_seed(1)
    ranks = torch.stack([torch.randperm(vocab, generator=generator) for _ in range(num_rows)])
    return (-1.5 * (ranks + 1).log()).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("params", [{"top_k": 50}, {"top_p": 0.9}, {"top_k": 200, "top_p": 0.95}])
def test_looking_at_the_likeliest_only_changes_no_token(
    params: dict[str, float], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = peaked_logits(300, 2000, dtype)
    rows = [row(n, seed=n, **params) for n in range(300)]
    with monkeypatch.context() as patched:
        if dtype != torch.bfloat16:  # whose equal entries may have to be sorted
            patched.delattr(sampler, "_draw_sorted")
        quick = sample(logits, rows)
    monkeypatch.setattr(sampler, "_draw_likely", lambda _, rows: torch.full((len(rows),), sampler.UNDECIDED))
    assert sample(logits, rows) == quick


@pytest.mark.parametrize("params", [{"top_k": 900}, {"top_p": 0.9}, {"top_k": 700, "top_p": 0.9}])
def test_rows_that_the_likeliest_do_not_cover_draw_from_all_they_admit(params: dict[str, float]) -> None:
    """The 256 candidates are too few where 1,000 tokens are about as likely."""
    logits = torch.linspace(0, 0.01, 1000).expand(6000, -1)
    drawn = sample(logits, [row(n, **params) for n in range(6000)])
    num_admitted = params.get("top_k", 1000) * params.get("top_p", 1)
    assert set(drawn) <= set(range(1000 - int(num_admitted), 1000))
    assert len(set(drawn)) > 0.97 * num_admitted


@pytest.mark.parametrize("vocab", [1, 5, 256, 257, 5000])
def test_any_size_of_vocabulary_is_drawn_from_evenly(vocab: int) -> None:
    drawn = sample(torch.zeros(4000, vocab), [row(n, seed=5) for n in range(4000)])
    counts = np.bincount(np.array(drawn), minlength=vocab)
    assert counts.sum() == 4000
    tenths = np.array([part.sum() for part in np.array_split(counts, min(vocab, 10))])
    sizes = np.array([len(part) for part in np.array_split(counts, min(vocab, 10))])
    assert tenths / 4000 == pytest.approx(sizes / vocab, abs=0.03)


def test_a_token_without_any_weight_is_never_drawn() -> None:
    logits = torch.full((2000, 1000), -torch.inf)
    logits[:, [3, 300, 999]] = 0.0
    for params in ({}, {"top_k": 10}, {"top_p": 0.99}):
        assert set(sample(logits, [row(n, **params) for n in range(2000)])) == {3, 300, 999}


@pytest.mark.parametrize("params", [{}, {"top_p": 0.9}, {"top_k": 40}])
def test_a_long_row_draws_the_same_token_alone_and_in_a_batch(params: dict[str, float]) -> None:
    logits = 3 * torch.randn(6, 50_000, generator=torch.Generator().manual_seed(2))
    rows = [row(n, seed=n, **params) for n in range(6)]
    torch.set_num_threads(2)
    try:
        alone = [sample(logits[n : n + 1], [rows[n]])[0] for n in range(6)]
        assert sample(logits, rows) == alone
    finally:
        torch.set_num_threads(1)
