"""The adjustments that a sequence needs, and the counts of its output."""

from typing import Any

import pytest

from shared.messages import SamplingParams
from worker.engine.sequence import Sequence


class CountedList(list[int]):
    """A list that counts the entries that are read from it in slices."""

    num_read = 0

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        self.num_read += len(found) if isinstance(key, slice) else 1
        return found


def make_sequence(**sampling: Any) -> Sequence:
    prompt = CountedList([5, 6, 7])
    return Sequence("r", 0, None, SamplingParams(**sampling), prompt, len(prompt), 10_000)


@pytest.mark.parametrize(
    "sampling",
    [{"presence_penalty": 1.0}, {"frequency_penalty": -0.5}, {"logit_bias": {7: 1.0}}, {"min_tokens": 2_000}],
    ids=str,
)
def test_the_adjustments_of_a_token_read_no_more_of_a_long_output_than_of_a_short_one(
    sampling: dict[str, Any],
) -> None:
    seq = make_sequence(**sampling)
    for number in range(1_000):
        assert seq.logit_adjustments is not None
        seq.token_ids.append(number % 3)
    assert isinstance(seq.token_ids, CountedList)
    assert seq.token_ids.num_read <= 1_000


def test_penalties_count_the_output_and_not_the_prompt_also_after_a_resume() -> None:
    seq = make_sequence(presence_penalty=1.0)
    seq.token_ids += [5, 9, 9]
    for more in ([], [5], [6, 9]):
        seq.token_ids += more
        adjustments = seq.logit_adjustments
        assert adjustments is not None
        counts = adjustments.output_counts
        assert counts is not None
        expected = seq.token_ids[3:]
        assert dict(zip(counts.token_ids, counts.counts, strict=True)) == {
            token_id: expected.count(token_id) for token_id in expected
        }


def test_no_counts_are_kept_without_penalties() -> None:
    adjustments = make_sequence(logit_bias={7: 1.0}).logit_adjustments
    assert adjustments is not None
    assert adjustments.output_counts is None
