"""Changes of logits before tokens are drawn from them: no other code of the model touches them."""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from worker.engine.sequence import LogitWishes


def adjust(logits: Tensor, wishes: Sequence[LogitWishes | None]) -> Tensor:
    """`logits` (num_rows, vocab) with the wishes of each row; the same tensor if there are none."""
    changes = [
        (row, token_id, change)
        for row, wish in enumerate(wishes)
        if wish is not None
        for token_id, change in _changes(wish).items()
    ]
    if not changes:
        return logits
    rows, token_ids, values = zip(*changes, strict=True)
    index = torch.tensor((rows, token_ids), device=logits.device)
    return logits.index_put(tuple(index), logits.new_tensor(values), accumulate=True)


def _changes(wish: LogitWishes) -> Mapping[int, float]:
    """Token id to what is added to its logit; minus infinity bans the token."""
    changes = dict(wish.bias)
    if wish.presence_penalty or wish.frequency_penalty:
        for token_id, count in Counter(wish.output_token_ids).items():
            penalty = wish.presence_penalty + wish.frequency_penalty * count
            changes[token_id] = changes.get(token_id, 0.0) - penalty
    return changes | dict.fromkeys(wish.banned, float("-inf"))
