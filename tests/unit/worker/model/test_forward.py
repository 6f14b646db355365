"""When a compiled graph takes over from the eager pass; `test_random_schedules` says what it computes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shared.messages import ForwardState
from worker.model.forward import MAX_NUM_DIFFERING_STEPS, CompiledForward, Graph

INPUTS = (torch.tensor([[3, 4]]), torch.tensor([[0, 1]]), torch.tensor([1]))
SINGLE = (torch.tensor([[5]]), torch.tensor([[2]]), torch.tensor([0]))
NONE_SAMPLED = (*INPUTS[:2], torch.tensor([], dtype=torch.long))
LOGITS = torch.tensor([[1.0, 2.0, 4.0]])
OTHERS = LOGITS.flip(-1)


def eager(token_ids: Tensor, positions: Tensor, sampled_rows: Tensor) -> Tensor:
    return LOGITS


class GivenSource:
    """Has its graph as soon as it is started, or whenever a test says so."""

    folder = Path("/graphs/graph-1")

    def __init__(self, graph: Graph | None = None) -> None:
        self._graph = graph

    def start(self, use: Callable[[Graph], None], give_up: Callable[[str], None]) -> None:
        self.use, self.give_up = use, give_up
        if self._graph is not None:
            use(self._graph)

    def wait(self) -> None:
        """Nothing to wait for."""

    def close(self) -> None:
        """Nothing to stop."""


def make_forward(graph: Graph, eager: Graph = eager) -> CompiledForward:
    return CompiledForward(eager, GivenSource(graph))


def run_until_refused(forward: CompiledForward, expected: Tensor = LOGITS) -> None:
    for _ in range(MAX_NUM_DIFFERING_STEPS):
        assert forward.state == ForwardState.COMPILED
        assert forward(*INPUTS) is expected
    assert forward.state == ForwardState.EAGER


def test_the_pass_is_eager_until_its_graph_is_compiled() -> None:
    source = GivenSource()
    forward = CompiledForward(eager, source)
    assert forward.state == ForwardState.COMPILING
    assert forward(*INPUTS) is LOGITS
    source.use(eager)
    assert forward.state == ForwardState.COMPILED


def test_a_graph_that_cannot_be_compiled_leaves_the_pass_eager_and_the_log_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = GivenSource()
    forward = CompiledForward(eager, source)
    source.give_up("the disk is full")
    assert forward.state == ForwardState.EAGER
    assert forward(*INPUTS) is LOGITS
    assert "eager, not compiled: the disk is full" in caplog.text


@pytest.mark.parametrize(
    ("graph", "problem"),
    [
        (lambda *inputs: OTHERS, "other logits"),
        (lambda *inputs: LOGITS * torch.nan, "other logits"),
    ],
    ids=["other", "nan"],
)
def test_a_graph_that_computes_something_else_is_refused_and_named(
    graph: Graph, problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    forward = make_forward(graph)
    run_until_refused(forward)
    assert problem in caplog.text
    assert "remove /graphs/graph-1 " in caplog.text
    assert forward(*INPUTS) is LOGITS


@pytest.mark.parametrize(
    ("graph", "problem"),
    [(lambda *inputs: LOGITS.T, "shape"), (lambda *inputs: 1 // 0, "ZeroDivisionError")],
    ids=["shape", "error"],
)
def test_a_graph_that_fails_is_refused_at_once(
    graph: Graph, problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    forward = make_forward(graph)
    assert forward(*INPUTS) is LOGITS
    assert forward.state == ForwardState.EAGER
    assert problem in caplog.text


def test_the_eager_pass_writes_last_into_the_cache_until_a_graph_is_checked() -> None:
    written: list[str] = []

    def write(name: str) -> Graph:
        return lambda *inputs: written.append(name) or LOGITS  # type: ignore[func-returns-value]

    forward = make_forward(write("graph"), eager=write("eager"))
    forward(*NONE_SAMPLED)
    assert written == ["eager"]
    forward(*INPUTS)
    assert written == ["eager", "graph", "eager"]
    forward(*NONE_SAMPLED)
    assert written == ["eager", "graph", "eager", "graph"]


def test_one_wrong_row_of_many_is_enough() -> None:
    expected = LOGITS.repeat(16, 1)
    wrong = expected.clone()
    wrong[7] = OTHERS
    run_until_refused(make_forward(lambda *inputs: wrong, eager=lambda *inputs: expected), expected)


def test_steps_that_differ_are_computed_eagerly_until_one_agrees() -> None:
    outputs = iter([OTHERS, OTHERS, LOGITS + 1e-6, OTHERS])
    forward = make_forward(lambda *inputs: next(outputs))
    assert [forward(*INPUTS) is LOGITS for _ in range(4)] == [True, True, True, False]


def test_an_error_of_the_eager_pass_itself_does_not_refuse_the_graph() -> None:
    def fail(*inputs: Tensor) -> Tensor:
        raise MemoryError

    forward = make_forward(fail, eager=fail)
    with pytest.raises(MemoryError):
        forward(*INPUTS)
    assert forward.state == ForwardState.COMPILED


def test_a_graph_is_compared_once_for_single_tokens_and_once_for_several() -> None:
    close = LOGITS * (1 + 1e-6)
    forward = make_forward(lambda *inputs: close)
    outputs = [forward(*inputs) for inputs in (INPUTS, INPUTS, SINGLE, SINGLE)]
    assert [output is close for output in outputs] == [False, True, False, True]


def test_rows_whose_eager_logits_are_not_finite_are_not_compared_and_prove_nothing() -> None:
    eager_outputs = iter([LOGITS * torch.nan, LOGITS])
    forward = make_forward(lambda *inputs: OTHERS, eager=lambda *inputs: next(eager_outputs))
    forward(*INPUTS)
    assert forward.state == ForwardState.COMPILED
    assert forward(*INPUTS) is LOGITS
