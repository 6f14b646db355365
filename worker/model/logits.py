"""Adjusts logits before sampling; no other code changes logits.

Grammars (for structured output) would be added here: `adjust` would ban the tokens that a sequence's grammar
does not allow next. A matcher, the object that follows one sequence through its grammar, would tell which;
`adjust` would get it from `Sequence.logit_adjustments`. Points to observe:

* Matchers need an owner: an LRU in a new `worker/model/grammar.py`, which `ModelRunner` has and passes
  through `sample`.
* `Intake.encode` should compile the grammar, by a new method of the `Model` port, because it runs in the
  threads of `PromptEncoder`. In the engine's thread (`Intake.prepare`), compiling would stall all streams.
* After a resume, a matcher is rebuilt from `Sequence.output_token_ids`. If it were rebuilt for each token, a
  token would take longer and longer as the output grows.
* A request with a grammar needs a new schema, one more than the current `SCHEMA_VERSION`. The schema that
  `SamplingParams.adjusts_logits` asks for is not enough: workers that know no grammars claim such requests.
* If the output already completes the grammar while `min_tokens` still bans the end-of-sequence tokens, no
  token is left to sample. Such a request must end, or the API must refuse it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from worker.engine.sequence import LogitAdjustments


class Changes(NamedTuple):
    """Numbers to add to the logits of one row."""

    token_ids: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]
    """The number for each entry of `token_ids`; minus infinity bans a token."""


def adjust(logits: Tensor, adjustments: Sequence[LogitAdjustments | None]) -> Tensor:
    """Returns `logits` (num_rows, vocab) with each row adjusted; `logits` itself if nothing changes."""
    changes = [
        (row, _changes(adjustment)) for row, adjustment in enumerate(adjustments) if adjustment is not None
    ]
    if not any(len(change.token_ids) for _, change in changes):
        return logits
    rows = np.repeat([row for row, _ in changes], [len(change.token_ids) for _, change in changes])
    token_ids = np.concatenate([change.token_ids for _, change in changes])
    values = np.concatenate([change.values for _, change in changes])
    index = torch.from_numpy(np.stack((rows, token_ids))).to(logits.device)
    return logits.index_put(tuple(index), torch.from_numpy(values).to(logits), accumulate=True)


def _changes(adjustment: LogitAdjustments) -> Changes:
    """Returns the changes of one row, with each token at most once."""
    # The counts are copied as whole arrays: a loop over a long output would delay every token of the batch.
    token_ids, values = np.empty(0, np.int64), np.empty(0, np.float64)
    counts = adjustment.output_counts
    if counts is not None:
        token_ids = np.array(counts.token_ids, np.int64)
        values = -(adjustment.presence_penalty + adjustment.frequency_penalty * np.array(counts.counts))
    others: dict[int, float] = {}
    for token_id, value in (*adjustment.bias.items(), *((banned, -np.inf) for banned in adjustment.banned)):
        index = counts.find(token_id) if counts is not None else None
        if index is None:
            others[token_id] = others.get(token_id, 0.0) + value
        else:
            values[index] += value
    return Changes(
        np.concatenate((token_ids, np.array([*others], np.int64))),
        np.concatenate((values, np.array([*others.values()], np.float64))),
    )
