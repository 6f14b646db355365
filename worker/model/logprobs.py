"""Computes the log probabilities of sampled tokens and of the most likely alternatives to them.

The probabilities are the model's own, before temperature, bias, penalties, grammar, top-k and top-p change
them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from worker.engine.sequence import Sampled, SampledToken
from worker.model.sampler import SamplingRow, largest


def with_logprobs(sampled: list[Sampled], logits: Tensor, rows: Sequence[SamplingRow]) -> list[Sampled]:
    """Adds log probabilities to the tokens of the rows whose requests ask for them.

    `logits`: the model's logits (num_rows, vocab), which nothing has changed.
    """
    tokens = {
        n: token
        for n, (token, row) in enumerate(zip(sampled, rows, strict=True))
        if row.params.logprobs is not None and isinstance(token, SampledToken)
    }
    if not tokens:
        return sampled
    # A copy of all rows would cost as much as their log_softmax.
    is_all = len(tokens) == len(rows)
    asked = logits if is_all else logits[torch.tensor([*tokens], device=logits.device)]
    asked = asked.to(torch.promote_types(asked.dtype, torch.float32)).log_softmax(dim=-1)
    chosen_ids = torch.tensor([[token.token_id] for token in tokens.values()], device=logits.device)
    chosen: list[float] = asked.gather(-1, chosen_ids).squeeze(-1).tolist()
    counts = [rows[n].params.logprobs or 0 for n in tokens]
    values, ids = largest(asked, min(max(counts), asked.shape[-1]))
    added = list(sampled)
    for (n, token), count, logprob, top_ids, top_values in zip(
        tokens.items(), counts, chosen, ids.tolist(), values.tolist(), strict=True
    ):
        alternatives = tuple(zip(top_ids[:count], top_values[:count], strict=True))
        added[n] = SampledToken(token.token_id, logprob, alternatives)
    return added
