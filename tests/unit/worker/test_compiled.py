"""The compiled forward pass beside the eager one; `test_random_schedules` says what it computes."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor, nn

from shared.messages import SamplingParams
from shared.settings import WorkerSettings
from shared.status import COMPILING
from tests.compiled import need_kernels, wait_until_compiled
from tests.tiny_models import build_adapter, build_model, generate_with_peft
from worker.compile_graph import Job
from worker.compiled import COMPILED, EAGER, CompiledForward, describe_job
from worker.model_runner import ModelRunner
from worker.sequence import ScheduledSequence, Sequence

torch.set_num_threads(1)

INPUTS = (torch.tensor([[3, 4]]), torch.tensor([[0, 1]]), torch.tensor([1]))
SINGLE = (torch.tensor([[5]]), torch.tensor([[2]]), torch.tensor([0]))
LOGITS = torch.tensor([[1.0, 2.0, 4.0]])


def eager(token_ids: Tensor, positions: Tensor, kept: Tensor) -> Tensor:
    return LOGITS


def impossible_job(folder: Path) -> Job:
    return Job(str(folder), "float32", False, [], {}, str(folder / "graph.pt2"))


@pytest.fixture
def fallen_back(tmp_path: Path) -> Iterator[CompiledForward]:
    forward = CompiledForward(eager, nn.Module(), impossible_job(tmp_path))
    forward.wait()
    yield forward
    forward.close()


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[ModelRunner]:
    need_kernels()
    folder = build_model(tmp_path / "model", "llama")
    runner = ModelRunner.load(WorkerSettings(model=str(folder), device="cpu", dtype="float64"))
    wait_until_compiled(runner)
    yield runner
    runner.close()


def forward_of(runner: ModelRunner) -> CompiledForward:
    assert isinstance(runner._run_model, CompiledForward)
    return runner._run_model


def test_what_cannot_be_compiled_is_told_and_stays_eager(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    forward = CompiledForward(eager, nn.Module(), impossible_job(tmp_path))
    forward.wait()
    assert forward.state == EAGER
    assert forward(*INPUTS) is LOGITS
    assert "eager, not compiled" in caplog.text
    assert str(tmp_path) in caplog.text


def test_while_it_compiles_it_is_eager_and_closing_ends_the_compiler(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    forward = CompiledForward(eager, nn.Module(), impossible_job(tmp_path))
    assert forward.state == COMPILING
    assert forward(*INPUTS) is LOGITS
    forward.close()
    assert not [
        child for child in psutil.Process().children() if "compile_graph" in " ".join(child.cmdline())
    ]
    assert "not compiled" not in caplog.text


def test_a_graph_that_computes_something_else_is_dropped(
    fallen_back: CompiledForward, caplog: pytest.LogCaptureFixture
) -> None:
    fallen_back._graph, fallen_back.state = lambda *inputs: LOGITS.flip(-1), COMPILED
    assert fallen_back(*INPUTS) is LOGITS
    assert fallen_back.state == EAGER
    assert fallen_back._graph is None
    assert "differ from the eager ones" in caplog.text


def test_a_graph_is_compared_once_for_single_tokens_and_once_for_several(
    fallen_back: CompiledForward,
) -> None:
    close = LOGITS * (1 + 1e-6)
    fallen_back._graph = lambda *inputs: close
    outputs = [fallen_back(*inputs) for inputs in (INPUTS, INPUTS, SINGLE, SINGLE)]
    assert [output is close for output in outputs] == [False, True, False, True]


def test_a_step_without_logits_proves_nothing(fallen_back: CompiledForward) -> None:
    fallen_back._graph = lambda *inputs: LOGITS.flip(-1)
    fallen_back(*INPUTS[:2], torch.tensor([], dtype=torch.long))
    assert fallen_back(*INPUTS) is LOGITS


def test_rows_that_are_not_finite_anyway_are_not_compared(fallen_back: CompiledForward) -> None:
    broken = torch.stack([LOGITS[0], LOGITS[0] * torch.nan])
    fallen_back._eager = lambda *inputs: broken
    fallen_back._graph = lambda *inputs: broken.nan_to_num()
    fallen_back(*INPUTS)
    assert fallen_back._graph is not None


def test_a_graph_is_kept_for_the_next_start(runner: ModelRunner) -> None:
    output = Path(forward_of(runner)._job.output)
    made_ns = output.stat().st_mtime_ns
    again = CompiledForward(eager, runner._model, forward_of(runner)._job)
    again.wait()
    assert again.state == COMPILED
    assert again._process is None
    assert output.stat().st_mtime_ns == made_ns


def test_another_config_or_precision_is_another_graph(runner: ModelRunner, tmp_path: Path) -> None:
    def output(folder: Path, model: nn.Module) -> str:
        return describe_job(folder, model, [], trust_remote_code=False).output

    folder, model = tmp_path / "model", runner._model
    first = output(folder, model)
    assert output(folder, model) == first
    (folder / "config.json").write_bytes((folder / "config.json").read_bytes() + b"\n")
    second = output(folder, model)
    assert second != first
    assert output(folder, model.float()) != second


def test_adapters_that_come_after_the_graph_are_used_by_it(runner: ModelRunner, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    adapter = build_adapter(tmp_path / "late", folder, seed=1, rank=4)
    prompt = list(range(5, 16))
    answers: dict[str | None, list[int]] = {None: generate(runner, prompt, None)}
    runner.add_adapter("late", str(adapter))
    answers["late"] = generate(runner, prompt, "late")
    assert runner.forward_state == COMPILED
    assert all(forward_of(runner)._is_checked.values())
    expected = {name: generate_with_peft(folder, name and adapter, prompt, 8) for name in (None, "late")}
    assert answers == expected
    assert answers[None] != answers["late"]


def generate(runner: ModelRunner, prompt: list[int], adapter_name: str | None) -> list[int]:
    seq = Sequence(
        "r", 0, adapter_name, SamplingParams(temperature=0), list(prompt), len(prompt), 8, block_table=[3, 1]
    )
    for _ in range(8):
        (token_id,) = runner.run([ScheduledSequence(seq, len(seq.token_ids) - seq.num_computed_tokens)])
        assert token_id is not None
        seq.num_computed_tokens = len(seq.token_ids)
        seq.token_ids.append(token_id)
    return seq.token_ids[len(prompt) :]
