"""A model's forward pass: eager, or a compiled graph after its logits have agreed with the eager ones."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from shared.logs import fields
from shared.messages import ForwardState
from worker.model.self_check import TOLERANCES, relative_error

logger = logging.getLogger(__name__)

Graph = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Computes logits (n, vocab) from token ids (1, T), positions (1, T) and the n sampled rows (n,)."""
Inputs = tuple[Tensor, Tensor, Tensor]

MAX_NUM_DIFFERING_STEPS = 8
"""Number of steps with differing logits after which a graph is refused. A single differing step proves
nothing, because rounding alone makes single rows of bfloat16 differ; a wrong graph differs in every step."""


class Forward(Protocol):
    """A forward pass; `state` tells whether it is eager, being compiled or compiled."""

    state: ForwardState

    def __call__(self, token_ids: Tensor, positions: Tensor, sampled_rows: Tensor) -> Tensor:
        """Returns logits (n, vocab) for token ids (1, T), positions (1, T) and the n sampled rows (n,)."""
        ...

    def wait(self) -> None:
        """Waits until nothing is being compiled."""

    def close(self) -> None:
        """Stops compiling."""


class GraphSource(Protocol):
    """Compiles a graph in the background; see `worker.model.graph_builder`."""

    folder: Path
    """The folder of the graph's files."""

    def start(self, use: Callable[[Graph], None], give_up: Callable[[str], None]) -> None:
        """Starts compiling; calls `use` with the graph when it is ready, or `give_up` with an error.

        The call may come from any thread.
        """

    def wait(self) -> None:
        """Waits until nothing is being compiled."""

    def close(self) -> None:
        """Stops compiling, without a call of `give_up`."""


class EagerForward:
    """The forward pass of a transformers model that PyTorch runs operation by operation."""

    def __init__(self, model: Any) -> None:
        self.state = ForwardState.EAGER
        self._model = model

    def __call__(self, token_ids: Tensor, positions: Tensor, sampled_rows: Tensor) -> Tensor:
        """Returns logits (n, vocab) of the sampled rows."""
        output = self._model(
            input_ids=token_ids, position_ids=positions, use_cache=False, logits_to_keep=sampled_rows
        )
        return output.logits[0]  # type: ignore[no-any-return]

    def wait(self) -> None:
        """Returns at once, because nothing is compiled."""

    def close(self) -> None:
        """Does nothing, because nothing is compiled."""


class CompiledForward:
    """A forward pass that is eager until its graph is compiled, and uses the graph from then on.

    In the first steps with the graph, the eager pass runs, too, and the logits of the two are compared. If
    the logits differ in too many steps, the graph is not used, and the forward pass stays eager.
    """

    def __init__(self, eager: Graph, source: GraphSource) -> None:
        """Begins to compile in the background."""
        self.state = ForwardState.COMPILING
        self._eager = eager
        self._source = source
        self._graph: Graph | None = None
        self._is_checked = {True: False, False: False}
        """True once the graph agreed with the eager pass: key True for steps of one token, key False for
        steps of several tokens."""
        self._num_differing_steps = 0
        source.start(self._use, self._stay_eager)

    def __call__(self, token_ids: Tensor, positions: Tensor, sampled_rows: Tensor) -> Tensor:
        """Returns logits (n, vocab) of the sampled rows."""
        inputs = token_ids, positions, sampled_rows
        graph, is_single = self._graph, token_ids.shape[1] == 1
        if graph is not None and self._is_checked[is_single]:
            return graph(*inputs)
        if graph is not None and len(sampled_rows):
            return self._compare(graph, inputs)
        return self._eager(*inputs)

    def wait(self) -> None:
        """Waits until nothing is being compiled."""
        self._source.wait()

    def close(self) -> None:
        """Stops compiling."""
        self._source.close()

    def _use(self, graph: Graph) -> None:
        # If the graph were set first, a step could refuse it, and COMPILED would overwrite the state EAGER.
        self.state = ForwardState.COMPILED
        self._graph = graph

    def _compare(self, graph: Graph, inputs: Inputs) -> Tensor:
        """Runs the graph and the eager pass, compares their logits, and returns the eager ones.

        The eager pass runs last, so that its keys and values stay in the cache, and not those of the
        unchecked graph.
        """
        logits: Tensor | Exception
        try:
            logits = graph(*inputs)
        except Exception as error:
            logits = error
        expected = self._eager(*inputs)
        if isinstance(logits, Exception):
            self._refuse(f"fails ({type(logits).__name__}: {logits})")
        elif logits.shape != expected.shape:
            self._refuse(f"gives logits of shape {list(logits.shape)}, not {list(expected.shape)}")
        else:
            rows = expected.isfinite().all(dim=-1)
            pairs = zip(logits[rows], expected[rows], strict=True)
            self._judge([relative_error(*pair) for pair in pairs], inputs[0].shape[1] == 1, expected.dtype)
        return expected

    def _judge(self, errors: list[float], is_single: bool, dtype: torch.dtype) -> None:
        """Accepts or refuses the graph by the errors of a step, one for each row with finite eager logits."""
        differing = [error for error in errors if not error <= TOLERANCES[dtype]]  # NaN differs, too
        if not differing:
            self._is_checked[is_single] = bool(errors)
            return
        self._num_differing_steps += 1
        if self._num_differing_steps == MAX_NUM_DIFFERING_STEPS:
            self._refuse(
                f"gives other logits than the eager pass in {len(differing)} of {len(errors)} rows (off by "
                f"{differing[0]:.2g} of their spread), as in {MAX_NUM_DIFFERING_STEPS - 1} steps before"
            )

    def _refuse(self, problem: str) -> None:
        """Stays eager. Keeps the graph's files, because the next start would otherwise compile it again."""
        self._stay_eager(f"the graph {problem}; remove {self._source.folder} to compile it again")

    def _stay_eager(self, reason: str) -> None:
        self._graph, self.state = None, ForwardState.EAGER
        logger.warning(
            "forward pass: eager, not compiled: %s (LORELAY_COMPILE=kernels turns compiling off)",
            reason,
            extra=fields("compile"),
        )
