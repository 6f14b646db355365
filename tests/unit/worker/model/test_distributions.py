"""Sampled tokens follow the exact distribution, which this module computes from the definitions."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from shared.messages import SamplingParams
from worker.engine.sequence import LogitAdjustments, SampledToken, TokenCounts
from worker.model.sampler import SamplingRow, sample

torch.set_num_threads(1)

VOCAB = 40
NUM_DRAWS = 6_000
LOGITS = 1.5 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
OUTPUT = (3, 3, 3, 7, 12, 12, 30)
PROMPT = (1, 3, 8, 9)
CASES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"top_k": 7},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"repetition_penalty": 1.8},
    {"presence_penalty": 1.2, "frequency_penalty": -0.5},
    {"logit_bias": {3: 2.0, 20: 4.0, 21: -100.0}},
    {"allowed_token_ids": (2, 3, 5, 7, 11, 13)},
    {"temperature": 1.4, "top_p": 0.9, "min_p": 0.05},
    {"top_k": 12, "top_p": 0.9, "frequency_penalty": 0.7},
    {"min_p": 0.02, "repetition_penalty": 0.7, "logit_bias": {5: 3.0}},
    {"temperature": 0.8, "presence_penalty": -1.5, "allowed_token_ids": tuple(range(0, 40, 2))},
]


def exact(params: SamplingParams) -> npt.NDArray[np.float64]:
    """Returns each token's probability, in vLLM's order: logits, temperature, min-p, top-k, top-p."""
    logits = LOGITS.numpy().copy()
    for token_id in {*PROMPT, *OUTPUT}:
        factor = params.repetition_penalty
        logits[token_id] = logits[token_id] / factor if logits[token_id] > 0 else logits[token_id] * factor
    for token_id, bias in params.logit_bias.items():
        logits[token_id] += bias
    for token_id in set(OUTPUT):
        logits[token_id] -= params.presence_penalty + params.frequency_penalty * OUTPUT.count(token_id)
    if params.allowed_token_ids:
        logits[[n for n in range(VOCAB) if n not in params.allowed_token_ids]] = -np.inf
    weights = np.exp((logits - logits.max()) / params.temperature)
    weights[weights < params.min_p] = 0
    order = np.argsort(-weights, kind="stable")
    weights[order[params.top_k or VOCAB :]] = 0
    before = np.cumsum(weights[order]) - weights[order]
    weights[order[before >= params.top_p * weights.sum()]] = 0
    return np.asarray(weights / weights.sum())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_draws_pass_a_chi_square_test_against_the_exact_distribution(case: dict[str, Any]) -> None:
    params = SamplingParams(seed=5, **case)
    adjustments = LogitAdjustments(
        bias=params.logit_bias,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        seen=TokenCounts(PROMPT + OUTPUT),
        allowed=params.allowed_token_ids,
        output_counts=TokenCounts(OUTPUT),
    )
    rows = [SamplingRow(params, 0, position, adjustments) for position in range(NUM_DRAWS)]
    drawn = [
        token.token_id
        for token in sample(LOGITS.expand(NUM_DRAWS, -1), rows)
        if isinstance(token, SampledToken)
    ]
    counts = np.bincount(drawn, minlength=VOCAB)
    expected = NUM_DRAWS * exact(params)
    assert counts[expected == 0].sum() == 0
    frequent = expected >= 5
    terms = (counts - expected)[frequent] ** 2 / expected[frequent]
    # The draws are the same in each run, so that a limit of five standard deviations never fails by chance.
    assert terms.sum() < frequent.sum() + 5 * np.sqrt(2 * frequent.sum())
    assert counts[~frequent].sum() <= expected[~frequent].sum() + 5 * np.sqrt(expected[~frequent].sum())
