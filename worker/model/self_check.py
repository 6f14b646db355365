"""Checks that a loaded model gives the same logits with batches and paged cache as without.

The check replaces a list of supported model families. Some models never call the attention function, some
keep state outside of the KV cache, and some derive parameters from all tokens of a batch. The check notices
the missing calls or the wrong logits of such a model, and refuses it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import ConfigurationError
from shared.messages import SamplingParams
from worker.engine.sequence import Batch, ScheduledSequence, Sequence
from worker.model.attention import NAME, AttentionState
from worker.model.kernels.products import FusedLinears, number_linears
from worker.model.lora import linears

TOLERANCES = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.1}
"""Maximum error of a row of logits, as a share of the row's spread; wrong rows have an error of about 1."""
MAX_NUM_NOISY_ROWS = 2
"""Number of rows that may exceed the tolerance in half precision, where rounding alone makes one row in a
hundred exceed it: in such rows of SmolLM2-135M, transformers' own bfloat16 logits differ from its float32
logits just as much. A fault in one kind of step makes at least three of the ten rows wrong, because later
steps read the cache that the faulty step wrote."""

LENGTHS = (17, 7, 12)
"""Number of tokens of each of the three check sequences."""
STEPS: tuple[tuple[int, int, int], ...] = (
    (6, 0, 0),  # a first chunk of a prefill
    (9, 5, 0),  # its second chunk beside another prefill
    (1, 1, 10),  # decodes beside a prefill
    (1, 1, 1),  # decodes alone
    (0, 0, 1),
)
"""Number of tokens of each sequence, by step."""


def num_blocks_needed(block_size: int) -> int:
    """Returns the number of KV cache blocks that the check uses."""
    return sum(-(-length // block_size) for length in LENGTHS)


@dataclass
class LinearCalls:
    """Observations of how a model calls its Linears in the steps of the check."""

    see_tokens: dict[str, bool] = field(default_factory=dict)
    """True if each call of the Linear had one row per token of the step; by the Linear's name."""
    see_sampled: dict[str, bool] = field(default_factory=dict)
    """True if each call of the Linear had one row per sampled token; by the Linear's name."""
    neighbours: set[tuple[str, str]] | None = None
    """Pairs of Linears that were called back to back on the same input tensor in every step so far. Such
    Linears may be fused. None before the first step."""

    def fusable_linears(self, model: nn.Module) -> list[FusedLinears]:
        """Groups the Linears that can be computed as one matmul.

        A Linear is left out if its input rows are neither all tokens of a step nor all sampled tokens.
        """
        modules = linears(model)
        tokens = {name: module for name, module in modules.items() if self.see_tokens.get(name)}
        heads = [name for name in modules if name not in tokens and self.see_sampled.get(name)]
        return number_linears(self._group(tokens), heads)

    def _group(self, layers: Mapping[str, nn.Linear]) -> list[list[str]]:
        """Groups the names of `layers`, in their order; a group has neighbours that can be fused."""
        groups: list[list[str]] = []
        for name, linear in layers.items():
            former = groups[-1][-1] if groups else ""
            if (former, name) in (self.neighbours or ()) and _are_alike(layers[former], linear):
                groups[-1].append(name)
            else:
                groups.append([name])
        return groups

    def end_step(self, calls: Iterable[tuple[str, Tensor]]) -> None:
        """Records which Linears a step called back to back; `calls` has (name, input rows) of each call."""
        pairs = {
            (name, next_name) for (name, rows), (next_name, next_rows) in pairwise(calls) if rows is next_rows
        }
        self.neighbours = pairs if self.neighbours is None else self.neighbours & pairs


def _are_alike(one: nn.Linear, other: nn.Linear) -> bool:
    return one.weight.dtype == other.weight.dtype and (one.bias is None) == (other.bias is None)


class SelfCheck:
    """Three short sequences, and the logits that the unchanged model computes for each sequence alone."""

    def __init__(self, model: Any, state: AttentionState, block_size: int, name: str) -> None:
        """Computes the logits of the unchanged model. `state.kv_cache` needs `num_blocks_needed` blocks.

        Raises:
            ConfigurationError: the unchanged model fails.
        """
        self._model = model
        self._state = state
        self._block_size = block_size
        self._name = name
        generator = torch.Generator().manual_seed(0)
        vocab = model.config.get_text_config().vocab_size
        self._ids = [torch.randint(vocab, (length,), generator=generator).tolist() for length in LENGTHS]
        with self._refused_on_error("its plain forward pass fails"):
            self._plain = [_plain_logits(model, sequence) for sequence in self._ids]

    def run(self, forward: Callable[[Batch], Tensor]) -> LinearCalls:
        """Runs the sequences in batches with `forward`, and compares the logits.

        Raises:
            ConfigurationError: the logits differ, or `forward` fails; the message names model and reason.
        """
        with self._refused_on_error("its forward pass over a batch of sequences fails"):
            calls, errors = self._run(forward)
        problem = _call_problem(self._model, self._state) or logits_problem(errors, self._model.dtype)
        if problem:
            raise ConfigurationError(f"LORELAY_MODEL: {self._name} can't be served: {problem}")
        return calls

    def run_again(self, forward: Callable[[Batch], Tensor]) -> None:
        """Repeats `run` after fused Linears and C++ kernels were put into a model that had passed the check.

        Raises:
            ConfigurationError: the check fails now; the message says that this is a fault of Lorelay.
        """
        try:
            self.run(forward)
        except ConfigurationError as error:
            raise ConfigurationError(
                f"{error.message} (with PyTorch's own calls it can: a fault of Lorelay's products or C++ "
                "kernels; LORELAY_COMPILE=off leaves the kernels out)"
            ) from error

    @contextmanager
    def _refused_on_error(self, what: str) -> Iterator[None]:
        """Turns any exception of the unknown model into a `ConfigurationError`."""
        try:
            yield
        except Exception as error:
            raise ConfigurationError(
                f"LORELAY_MODEL: {self._name} can't be served: {what}: {type(error).__name__}: {error}"
            ) from error

    def _run(self, forward: Callable[[Batch], Tensor]) -> tuple[LinearCalls, list[float]]:
        sequences = _sequences(self._block_size)
        calls, errors = LinearCalls(), []
        self._state.calls.clear()
        for counts in STEPS:
            batch = _schedule(sequences, self._ids, counts)
            with _watched(self._model, sum(counts), len(batch), calls):
                logits = forward(batch)
            rows = [self._plain[sequences.index(item.seq)][len(item.seq.token_ids) - 1] for item in batch]
            for row, plain_row in zip(logits, rows[: len(logits)], strict=True):
                errors.append(relative_error(row, plain_row))
            for item in batch:
                item.seq.num_computed_tokens += item.num_tokens
        return calls, errors


def _sequences(block_size: int) -> list[Sequence]:
    """Returns empty sequences, whose block tables get the cache's blocks in turn, from the last block on."""
    free = list(range(num_blocks_needed(block_size)))
    sequences = [Sequence("self-check", n, None, SamplingParams(), [], 0, 1) for n in range(len(LENGTHS))]
    while free:
        for seq, length in zip(sequences, LENGTHS, strict=True):
            if len(seq.block_table) * block_size < length:
                seq.block_table.append(free.pop())
    return sequences


def _schedule(
    sequences: list[Sequence], ids: list[list[int]], counts: tuple[int, ...]
) -> list[ScheduledSequence]:
    """Returns a batch with the next `counts` tokens of the sequences.

    Each sequence is cut after these tokens, so that the last of them gets logits.
    """
    batch = []
    for seq, sequence_ids, count in zip(sequences, ids, counts, strict=True):
        if count:
            seq.token_ids = sequence_ids[: seq.num_computed_tokens + count]
            batch.append(ScheduledSequence(seq, count))
    return batch


@torch.inference_mode()
def _plain_logits(model: Any, token_ids: list[int]) -> Tensor:
    """Returns logits (num_tokens, vocab), computed with transformers' own attention."""
    model.set_attn_implementation("eager")
    try:
        input_ids = torch.tensor([token_ids], device=model.device)
        return model(input_ids=input_ids, use_cache=False).logits[0]  # type: ignore[no-any-return]
    finally:
        model.set_attn_implementation(NAME)


@contextmanager
def _watched(model: nn.Module, num_tokens: int, num_sampled: int, calls: LinearCalls) -> Iterator[None]:
    """Records in `calls` how one step calls the model's Linears."""
    handles = []
    rows: list[tuple[str, Tensor]] = []
    for name, module in linears(model).items():

        def note(linear: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            rows.append((name, inputs[0]))
            num_rows = inputs[0].shape[:-1].numel()
            is_one_row = inputs[0].dim() == 2 or inputs[0].shape[-2] == num_rows
            for seen, expected in ((calls.see_tokens, num_tokens), (calls.see_sampled, num_sampled)):
                seen[name] = seen.get(name, True) and is_one_row and num_rows == expected

        handles.append(module.register_forward_pre_hook(note))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    calls.end_step(rows)


def relative_error(row: Tensor, plain: Tensor) -> float:
    """Returns the norm of the difference of two rows of logits, divided by the spread of `plain`."""
    row, plain = row.double(), plain.double()
    return float((row - plain).norm() / (plain - plain.mean()).norm())


def _call_problem(model: Any, state: AttentionState) -> str | None:
    config = model.config.get_text_config()
    expected = {layer: len(STEPS) for layer in range(config.num_hidden_layers)}
    wrong = {
        layer: state.calls[layer] for layer in expected | state.calls if state.calls[layer] != len(STEPS)
    }
    if not state.calls:
        return "none of its layers calls the attention function"
    if wrong:
        return (
            f"its layers {sorted(wrong)} don't call the attention function once per pass (linear attention?)"
        )
    for layer, kind in enumerate(getattr(config, "layer_types", None) or ()):
        if kind == "sliding_attention" and state.windows[layer] is None:
            return f"its layer {layer} keeps its sliding window from the attention function"
    return None


def logits_problem(errors: list[float], dtype: torch.dtype) -> str | None:
    """Describes the problem if too many relative errors of rows (`errors`) are large; None otherwise."""
    differing = [error for error in errors if not error <= TOLERANCES.get(dtype, 1e-3)]  # NaN differs, too
    if len(differing) <= (MAX_NUM_NOISY_ROWS if dtype.itemsize == 2 else 0):
        return None
    return (
        f"its logits in a batch of sequences differ from the plain ones in {len(differing)} of {len(errors)} "
        f"rows (by {max(differing):.2g} of their spread)"
    )
