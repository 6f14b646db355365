"""Whether a model computes the same packed, over the paged cache, as it does plainly. Run once at load.

Not a list of model families: some never call the attention function, some keep state elsewhere, some take
parameters from the whole pack. All that shows as other logits or other calls, and the model is refused.
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
from worker.model.lora import linears

TOLERANCES = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.1}
"""Largest admitted error of a row of logits, as a share of the row's spread; a wrong one is around 1."""
MAX_NUM_NOISY_ROWS = 2
"""In half precision a row in a hundred depends on rounding alone: SmolLM2-135M in bfloat16 is then as far
from itself in float32. A wrong kind of step shows in three of the ten rows at least, by what it leaves in the
cache."""

LENGTHS = (17, 7, 12)
"""Tokens of the three check sequences."""
STEPS: tuple[tuple[int, int, int], ...] = (
    (6, 0, 0),  # a first chunk of a prefill
    (9, 5, 0),  # the rest of it beside another prefill
    (1, 1, 10),  # decodes beside a prefill
    (1, 1, 1),  # decodes alone
    (0, 0, 1),
)
"""How many tokens of each sequence the steps run."""


def num_blocks_needed(block_size: int) -> int:
    """Blocks that the check takes."""
    return sum(-(-length // block_size) for length in LENGTHS)


@dataclass
class LinearCalls:
    """What the Linears of a model saw at every step."""

    see_tokens: dict[str, bool] = field(default_factory=dict)
    """Whether one row per token of the step, ..."""
    see_kept: dict[str, bool] = field(default_factory=dict)
    """... or one per kept row of it."""
    neighbours: set[tuple[str, str]] | None = None
    """Those called one after the other with the same rows; None before the first step."""

    def select(self, model: nn.Module) -> tuple[dict[str, nn.Linear], dict[str, nn.Linear]]:
        """The model's Linears that see all tokens, and those that see the kept rows."""
        modules = linears(model)
        tokens = {name: module for name, module in modules.items() if self.see_tokens.get(name)}
        kept = {
            name: module for name, module in modules.items() if name not in tokens and self.see_kept.get(name)
        }
        return tokens, kept

    def group(self, layers: Mapping[str, nn.Linear]) -> list[list[str]]:
        """The names of `layers` in their order, those side by side that one product can compute."""
        groups: list[list[str]] = []
        for name, linear in layers.items():
            former = groups[-1][-1] if groups else ""
            if (former, name) in (self.neighbours or ()) and _are_alike(layers[former], linear):
                groups[-1].append(name)
            else:
                groups.append([name])
        return groups

    def end_step(self, calls: Iterable[tuple[str, Tensor]]) -> None:
        """Notes which Linears were called with which rows, in the order of the calls."""
        pairs = {
            (name, next_name) for (name, rows), (next_name, next_rows) in pairwise(calls) if rows is next_rows
        }
        self.neighbours = pairs if self.neighbours is None else self.neighbours & pairs


def _are_alike(one: nn.Linear, other: nn.Linear) -> bool:
    return one.weight.dtype == other.weight.dtype and (one.bias is None) == (other.bias is None)


class SelfCheck:
    """Three short sequences, as a model computes them plainly before anything in it is replaced."""

    def __init__(self, model: Any, state: AttentionState, block_size: int, name: str) -> None:
        """`state.kv_cache` needs `num_blocks_needed` blocks.

        Raises:
            ConfigurationError: the model's plain forward pass fails.
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
        """Runs them packed with `forward`, and compares.

        Raises:
            ConfigurationError: they differ, or it fails; names the model and the reason.
        """
        with self._refused_on_error("its forward pass over packed sequences fails"):
            calls, errors = self._run(forward)
        problem = _call_problem(self._model, self._state) or _logits_problem(errors, self._model.dtype)
        if problem:
            raise ConfigurationError(f"LORELAY_MODEL: {self._name} can't be served: {problem}")
        return calls

    def run_again(self, forward: Callable[[Batch], Tensor]) -> None:
        """The same, when the products and the attention of a model that passed were replaced by our own.

        Raises:
            ConfigurationError: says so, since then it is our fault.
        """
        try:
            self.run(forward)
        except ConfigurationError as error:
            raise ConfigurationError(
                f"{error.message} (with PyTorch's own calls it can: a fault of Lorelay's products or C++ "
                "operators; LORELAY_COMPILE=off leaves the latter out)"
            ) from error

    @contextmanager
    def _refused_on_error(self, what: str) -> Iterator[None]:
        """Whatever an unknown model raises on such input means that it can't be served."""
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
            for packed_row, plain_row in zip(logits, rows[: len(logits)], strict=True):
                errors.append(relative_error(packed_row, plain_row))
            for item in batch:
                item.seq.num_computed_tokens += item.num_tokens
        return calls, errors


def _sequences(block_size: int) -> list[Sequence]:
    """Empty sequences whose blocks are dealt from the cache's last block down, in turns."""
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
    """A batch in which every sequence ends with its scheduled tokens, so that each gives a row of logits."""
    batch = []
    for seq, sequence_ids, count in zip(sequences, ids, counts, strict=True):
        if count:
            seq.token_ids = sequence_ids[: seq.num_computed_tokens + count]
            batch.append(ScheduledSequence(seq, count))
    return batch


@torch.inference_mode()
def _plain_logits(model: Any, token_ids: list[int]) -> Tensor:
    """(num_tokens, vocab), with transformers' own attention."""
    model.set_attn_implementation("eager")
    try:
        input_ids = torch.tensor([token_ids], device=model.device)
        return model(input_ids=input_ids, use_cache=False).logits[0]  # type: ignore[no-any-return]
    finally:
        model.set_attn_implementation(NAME)


@contextmanager
def _watched(model: nn.Module, num_tokens: int, num_kept: int, calls: LinearCalls) -> Iterator[None]:
    """Notes the rows that each Linear sees meanwhile."""
    handles = []
    rows: list[tuple[str, Tensor]] = []
    for name, module in linears(model).items():

        def note(linear: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            rows.append((name, inputs[0]))
            num_rows = inputs[0].shape[:-1].numel()
            is_packed = inputs[0].dim() == 2 or inputs[0].shape[-2] == num_rows
            for seen, expected in ((calls.see_tokens, num_tokens), (calls.see_kept, num_kept)):
                seen[name] = seen.get(name, True) and is_packed and num_rows == expected

        handles.append(module.register_forward_pre_hook(note))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    calls.end_step(rows)


def relative_error(packed: Tensor, plain: Tensor) -> float:
    """The difference of two rows of logits, as a share of the spread of the second."""
    packed, plain = packed.double(), plain.double()
    return float((packed - plain).norm() / (plain - plain.mean()).norm())


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


def _logits_problem(errors: list[float], dtype: torch.dtype) -> str | None:
    differing = [error for error in errors if not error <= TOLERANCES.get(dtype, 1e-3)]  # NaN is one
    if len(differing) <= (MAX_NUM_NOISY_ROWS if dtype.itemsize == 2 else 0):
        return None
    return (
        f"its logits over packed sequences differ from the plain ones in {len(differing)} of {len(errors)} "
        f"rows (by {max(differing):.2g} of their spread)"
    )
