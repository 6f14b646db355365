"""Log probabilities of sampled tokens, also against transformers' own forward pass."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from shared.messages import SamplingParams, StreamEvent
from shared.settings import WorkerSettings
from tests.fakes import build_engine, encoded
from tests.streams import make_request
from tests.tiny_models import build_model
from worker.engine.sequence import LogitAdjustments, SampledToken
from worker.model.logprobs import with_logprobs
from worker.model.sampler import SamplingRow, sample
from worker.model.startup import load_model_runner

torch.set_num_threads(1)

LOGITS = 2 * torch.randn(6, 300, generator=torch.Generator().manual_seed(1))
TOLERANCE = 1e-3


def row(adjustments: LogitAdjustments | None = None, **params: object) -> SamplingRow:
    return SamplingRow(SamplingParams(**params), 0, 0, adjustments)  # type: ignore[arg-type]


def report(logits: torch.Tensor, *rows: SamplingRow) -> list[SampledToken]:
    tokens = with_logprobs(sample(logits, rows), logits, rows)
    assert all(isinstance(token, SampledToken) for token in tokens)
    return [token for token in tokens if isinstance(token, SampledToken)]


def test_a_row_gets_as_many_alternatives_as_it_asks_for_and_its_own_token_beside_them() -> None:
    rows = [row(logprobs=count, temperature=2.0, seed=9) for count in (0, 1, 5, 20)]
    for expected, token, one in zip(LOGITS[:4].log_softmax(-1), report(LOGITS[:4], *rows), rows, strict=True):
        assert token.logprob == pytest.approx(float(expected[token.token_id]))
        count = one.params.logprobs or 0
        assert [token_id for token_id, _ in token.alternatives] == expected.argsort(descending=True)[
            :count
        ].tolist()
        assert [logprob for _, logprob in token.alternatives] == pytest.approx(
            expected.sort(descending=True).values[:count].tolist()
        )


def test_a_row_that_does_not_ask_gets_none_beside_rows_that_do() -> None:
    plain, asking = report(LOGITS[:2], row(temperature=0), row(temperature=0, logprobs=2))
    assert plain == SampledToken(int(LOGITS[0].argmax()))
    assert len(asking.alternatives) == 2


@pytest.mark.parametrize(
    "params",
    [{"temperature": 0.1}, {"temperature": 0}, {"top_k": 1}, {"top_p": 0.1}],
    ids=str,
)
def test_temperature_bias_penalties_and_filters_change_no_log_probability(params: dict[str, float]) -> None:
    adjustments = LogitAdjustments(bias={7: 100.0}, banned=(3,))
    (token,) = report(LOGITS[:1], row(adjustments, logprobs=3, **params))
    expected = LOGITS[0].log_softmax(-1)
    assert token.token_id == 7
    assert token.logprob == pytest.approx(float(expected[7]))
    assert dict(token.alternatives) == pytest.approx(
        {int(token_id): float(expected[token_id]) for token_id in expected.topk(3).indices}
    )


def test_a_vocabulary_smaller_than_the_number_of_alternatives_is_reported_whole() -> None:
    (token,) = report(LOGITS[:1, :4], row(logprobs=20))
    assert len(token.alternatives) == 4


def test_a_row_without_finite_logits_keeps_its_error() -> None:
    logits = LOGITS[:2].clone()
    logits[0, 5] = torch.nan
    failed, token = with_logprobs(sample(logits, [row(logprobs=1)] * 2), logits, [row(logprobs=1)] * 2)
    assert not isinstance(failed, SampledToken)
    assert isinstance(token, SampledToken)
    assert token.logprob is not None


def test_log_probabilities_are_those_of_transformers(tmp_path: Path) -> None:
    folder = build_model(tmp_path / "model")
    runner = load_model_runner(
        WorkerSettings(model=str(folder), device="cpu", dtype="float32", block_size=4, compile="off")
    )
    engine = build_engine(runner)
    sampling = SamplingParams(max_tokens=12, logprobs=5, seed=4, temperature=1.5, presence_penalty=1.0)
    request = make_request(base=runner.served.base.name, model=runner.served.base.name, sampling=sampling)
    prompts = encoded(engine, request)
    assert isinstance(prompts, list)
    engine.add_request(request, prompts)
    events: list[StreamEvent] = []
    while engine.has_work:
        events += [output.event for output in engine.step()]
    runner.close()
    answer = [token_id for event in events for token_id in event.token_ids]
    positions = [position for event in events for position in event.logprobs or ()]
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = reference(torch.tensor([prompts[0] + answer])).logits[0, len(prompts[0]) - 1 : -1]
    assert [position.chosen.token_id for position in positions] == answer
    for position, expected in zip(positions, logits.log_softmax(-1), strict=True):
        top = expected.topk(5)
        assert [one.token_id for one in position.top] == top.indices.tolist()
        assert [one.logprob for one in position.top] == pytest.approx(top.values.tolist(), abs=TOLERANCE)
        chosen = position.chosen
        assert math.isclose(chosen.logprob, float(expected[chosen.token_id]), abs_tol=TOLERANCE)
        assert chosen.token_bytes == runner.served.base.tokenizer.token_bytes(chosen.token_id)
