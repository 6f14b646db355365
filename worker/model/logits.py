"""Adjusts logits before sampling; no other code changes logits.

A grammar per sequence would be a mask in `adjust`. `Sequence.logit_adjustments` would hand `adjust` the
grammar and `output_token_ids`, from which a matcher can be rebuilt after a resume. Points to observe:

* Matchers need an owner: an LRU in a new `worker/model/grammar.py`, which `ModelRunner` has and passes
  through `sample`.
* `Intake.encode` should compile the grammar, by a new method of the `Model` port, because it runs in the
  threads of `PromptEncoder`. In the engine's thread (`Intake.prepare`), compiling would stall all streams.
* `SamplingParams.adjusts_logits` decides whether a request needs schema 2, which workers without grammars
  claim, too. A grammar needs schema 3.
* While `min_tokens` bans the end-of-sequence tokens, a complete grammar leaves no token to sample: the
  request must end then, or the API must refuse it.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from worker.engine.sequence import LogitAdjustments


def adjust(logits: Tensor, adjustments: Sequence[LogitAdjustments | None]) -> Tensor:
    """Returns `logits` (num_rows, vocab) with each row adjusted; `logits` itself if nothing changes."""
    changes = [
        (row, token_id, change)
        for row, adjustment in enumerate(adjustments)
        if adjustment is not None
        for token_id, change in _changes(adjustment).items()
    ]
    if not changes:
        return logits
    rows, token_ids, values = zip(*changes, strict=True)
    index = torch.tensor((rows, token_ids), device=logits.device)
    return logits.index_put(tuple(index), logits.new_tensor(values), accumulate=True)


def _changes(adjustment: LogitAdjustments) -> Mapping[int, float]:
    """Returns the number to add to each logit, by token id; minus infinity bans a token."""
    changes = dict(adjustment.bias)
    if adjustment.presence_penalty or adjustment.frequency_penalty:
        for token_id, count in Counter(adjustment.output_token_ids).items():
            penalty = adjustment.presence_penalty + adjustment.frequency_penalty * count
            changes[token_id] = changes.get(token_id, 0.0) - penalty
    return changes | dict.fromkeys(adjustment.banned, float("-inf"))
