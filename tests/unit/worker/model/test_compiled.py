"""The compiled forward pass beside the eager one; `test_random_schedules` says what it computes."""

import fcntl
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
import safetensors
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from shared.messages import ForwardState, SamplingParams
from shared.settings import WorkerSettings
from tests.compiled import need_kernels, wait_until_compiled
from tests.tiny_models import add_adapter, build_adapter, build_model, generate_with_peft
from tests.waiting import wait_until
from worker.engine.sequence import SampledToken, ScheduledSequence, Sequence
from worker.model.compile_graph import Job
from worker.model.compiled import (
    MAX_NUM_DIFFERING_STEPS,
    CompiledForward,
    Forward,
    describe_job,
    drop_cut_off,
    drop_unused,
)
from worker.model.kernels import native
from worker.model.model_runner import ModelRunner

torch.set_num_threads(1)

INPUTS = (torch.tensor([[3, 4]]), torch.tensor([[0, 1]]), torch.tensor([1]))
SINGLE = (torch.tensor([[5]]), torch.tensor([[2]]), torch.tensor([0]))
LOGITS = torch.tensor([[1.0, 2.0, 4.0]])
WORKER = """
import sys, msgspec
from torch import nn
from worker.model.compiled import CompiledForward, Job
CompiledForward(None, nn.Module(), msgspec.json.decode(sys.argv[1], type=Job)).wait()
"""


def eager(token_ids: Tensor, positions: Tensor, kept: Tensor) -> Tensor:
    return LOGITS


def impossible_job(folder: Path) -> Job:
    return Job(str(folder), "float32", False, [], {}, {}, str(folder / "graph"))


def job_for_a_real_model(folder: Path) -> Job:
    """Its output goes to `folder`."""
    need_kernels()
    path = build_model(folder / "model", "llama")
    model = AutoModelForCausalLM.from_pretrained(path)
    job = describe_job(path, model, [], trust_remote_code=False)
    return msgspec.structs.replace(job, output=str(folder / "graph"))


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
    assert forward.state == ForwardState.EAGER
    assert forward(*INPUTS) is LOGITS
    assert "eager, not compiled" in caplog.text
    assert str(tmp_path) in caplog.text


def test_while_it_compiles_it_is_eager_and_closing_ends_the_compiler(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    forward = CompiledForward(eager, nn.Module(), impossible_job(tmp_path))
    assert forward.state == ForwardState.COMPILING
    assert forward(*INPUTS) is LOGITS
    forward.close()
    assert not [
        child for child in psutil.Process().children() if "compile_graph" in " ".join(child.cmdline())
    ]
    assert "not compiled" not in caplog.text


def test_what_a_compiler_that_failed_said_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    forward = CompiledForward(eager, nn.Module(), impossible_job(tmp_path))
    forward.wait()
    assert str(tmp_path / "graph.log") in caplog.text
    assert "Traceback" in (tmp_path / "graph.log").read_text()


@pytest.mark.parametrize(
    ("graph", "problem"),
    [
        (lambda *inputs: LOGITS.flip(-1), "other logits"),
        (lambda *inputs: LOGITS * torch.nan, "other logits"),
        (lambda *inputs: LOGITS.T, "shape"),
        (lambda *inputs: 1 // 0, "ZeroDivisionError"),
    ],
    ids=["other", "nan", "shape", "error"],
)
def test_a_graph_that_computes_something_else_or_nothing_is_dropped_and_named(
    graph: Forward, problem: str, fallen_back: CompiledForward, caplog: pytest.LogCaptureFixture
) -> None:
    fallen_back._graph, fallen_back.state = graph, ForwardState.COMPILED
    for _ in range(MAX_NUM_DIFFERING_STEPS):
        assert fallen_back(*INPUTS) is LOGITS
    assert (fallen_back.state, fallen_back._graph) == (ForwardState.EAGER, None)
    assert problem in caplog.text
    assert f"remove {fallen_back._job.output} " in caplog.text


def test_the_eager_pass_has_the_last_word_in_the_cache_until_a_graph_is_checked(
    fallen_back: CompiledForward,
) -> None:
    written = []
    fallen_back._eager = lambda *inputs: written.append("eager") or LOGITS
    fallen_back._graph = lambda *inputs: written.append("graph") or LOGITS
    nothing_kept = torch.tensor([], dtype=torch.long)
    fallen_back(*INPUTS[:2], nothing_kept)
    assert written == ["eager"]
    fallen_back(*INPUTS)
    assert written == ["eager", "graph", "eager"]
    fallen_back(*INPUTS[:2], nothing_kept)
    assert written == ["eager", "graph", "eager", "graph"]


def test_one_wrong_row_of_many_is_enough(fallen_back: CompiledForward) -> None:
    expected = LOGITS.repeat(16, 1)
    wrong = expected.clone()
    wrong[7] = LOGITS.flip(-1)
    fallen_back._eager = lambda *inputs: expected
    fallen_back._graph = lambda *inputs: wrong
    for _ in range(MAX_NUM_DIFFERING_STEPS):
        assert fallen_back(*INPUTS) is expected
    assert fallen_back._graph is None


def test_steps_that_differ_are_computed_eagerly_until_one_agrees(fallen_back: CompiledForward) -> None:
    outputs = iter([LOGITS.flip(-1), LOGITS.flip(-1), LOGITS + 1e-6, LOGITS.flip(-1)])
    fallen_back._graph = lambda *inputs: next(outputs)
    assert [fallen_back(*INPUTS) is LOGITS for _ in range(4)] == [True, True, True, False]


def test_an_error_of_the_eager_pass_itself_says_nothing_of_the_graph(fallen_back: CompiledForward) -> None:
    def fail(*inputs: Tensor) -> Tensor:
        raise MemoryError

    fallen_back._graph = fallen_back._eager = fail
    with pytest.raises(MemoryError):
        fallen_back(*INPUTS)
    assert fallen_back._graph is fail


def test_a_graph_is_compared_once_for_single_tokens_and_once_for_several(
    fallen_back: CompiledForward,
) -> None:
    close = LOGITS * (1 + 1e-6)
    fallen_back._graph = lambda *inputs: close
    outputs = [fallen_back(*inputs) for inputs in (INPUTS, INPUTS, SINGLE, SINGLE)]
    assert [output is close for output in outputs] == [False, True, False, True]


def test_rows_that_are_not_finite_anyway_are_not_compared_and_prove_nothing(
    fallen_back: CompiledForward,
) -> None:
    broken = LOGITS * torch.nan
    fallen_back._eager = lambda *inputs: broken
    fallen_back._graph = lambda *inputs: LOGITS.flip(-1)
    fallen_back(*INPUTS)
    assert fallen_back._graph is not None
    fallen_back._eager = eager
    assert fallen_back(*INPUTS) is LOGITS


def test_a_graph_is_kept_for_the_next_start(runner: ModelRunner) -> None:
    output = Path(forward_of(runner)._job.output)
    made = output.stat().st_ino
    os.utime(output, (0, 0))
    again = CompiledForward(eager, runner._model, forward_of(runner)._job)
    again.wait()
    assert again.state == ForwardState.COMPILED
    assert again._process is None
    assert output.stat().st_ino == made
    assert output.stat().st_mtime > 0  # so that it is known to be in use


def test_a_damaged_graph_is_compiled_anew_by_the_next_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    need_kernels()
    job = impossible_job(tmp_path)
    damaged = Path(job.output) / "graph.so"
    damaged.parent.mkdir()
    damaged.write_bytes(b"cut off")
    forward = CompiledForward(eager, nn.Module(), job)
    forward.wait()
    assert forward.state == ForwardState.EAGER
    assert str(damaged) in caplog.text
    assert not Path(job.output).exists()


def test_loading_a_graph_leaves_nothing_in_the_temporary_folder(runner: ModelRunner) -> None:
    found = set(Path(tempfile.gettempdir()).glob("aotinductor_*"))
    again = CompiledForward(eager, runner._model, forward_of(runner)._job)
    again.wait()
    assert again.state == ForwardState.COMPILED
    assert set(Path(tempfile.gettempdir()).glob("aotinductor_*")) <= found


def test_a_tensor_whose_precision_the_config_does_not_tell_is_not_compiled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = job_for_a_real_model(tmp_path)
    name = "model.norm.weight"
    forward = CompiledForward(
        eager, nn.Module(), msgspec.structs.replace(job, layouts=job.layouts | {name: "torch.float64 [32]"})
    )
    forward.wait()
    assert forward.state == ForwardState.EAGER
    assert f"{name} is torch.float64" in caplog.text


def test_a_killed_worker_leaves_no_compiler_behind(tmp_path: Path) -> None:
    """Neither ours nor the g++ that it has started, nor what they have written so far."""
    job = job_for_a_real_model(tmp_path)
    environment = os.environ | {"CXX": "no-such-compiler"}  # PyTorch would take it
    command = [sys.executable, "-c", WORKER, msgspec.json.encode(job)]
    worker = subprocess.Popen(command, env=environment)
    started: list[psutil.Process] = []

    def is_compiling() -> bool:
        assert worker.poll() is None
        started[:] = psutil.Process(worker.pid).children(recursive=True)
        return any(process.name() == "cc1plus" for process in started)

    wait_until(is_compiling, 60)
    worker.kill()
    worker.wait()
    _, left = psutil.wait_procs(started, timeout=30)
    assert not left
    assert not list(tmp_path.glob("compiling-*"))


def test_workers_compile_one_at_a_time_and_one_that_waits_can_end(tmp_path: Path) -> None:
    with (tmp_path / "compile.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        forward = CompiledForward(eager, nn.Module(), impossible_job(tmp_path))
        forward.close()
        assert not forward._thread.is_alive()
        assert forward._process is None


def test_what_was_not_used_for_long_is_dropped(tmp_path: Path) -> None:
    for name in ("graph-old", "graph-new", "compiling-killed", "building-killed", "model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    for name in ("kernels-old.so", "kernels-new.so"):
        (tmp_path / name).touch()
    for name in ("graph-old", "building-killed", "kernels-old.so", "model"):
        os.utime(tmp_path / name, (0, 0))
    drop_unused(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"graph-new", "kernels-new.so", "model"}


def test_what_was_cut_off_is_dropped_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A disk that lost power leaves such files; to load a library that ends early kills the process."""
    folder = tmp_path / "lorelay"
    whole = Path(safetensors._safetensors_rust.__file__).read_bytes()
    for name, content in {
        "kernels-whole.so": whole,
        "kernels-cut.so": whole[: len(whole) // 2],
        "kernels-unwritten.so": whole[: len(whole) // 2].ljust(len(whole), b"\0"),
        "kernels-other.so": b"no library: loading it says so",
        "graph-whole/data/graph.so": whole,
        "graph-cut/data/graph.so": whole[:-1],
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    found: set[str] = set()

    def make_callable(device: torch.device) -> bool:
        found.update(path.name for path in folder.iterdir())
        return False

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "make_callable", make_callable)
    model = build_model(tmp_path / "model")
    ModelRunner.load(WorkerSettings(model=str(model), device="cpu", cache_max_bytes=1 << 20))
    assert found == {"kernels-whole.so", "kernels-other.so", "graph-whole"}
    assert str(folder / "kernels-cut.so") in caplog.text


def test_a_cache_folder_that_is_not_there_or_cannot_be_read_stops_nothing(tmp_path: Path) -> None:
    drop_cut_off(tmp_path / "none")
    (tmp_path / "kernels-folder.so").mkdir()
    drop_cut_off(tmp_path)


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
    add_adapter(runner, "late", adapter)
    answers["late"] = generate(runner, prompt, "late")
    assert runner.forward_state == ForwardState.COMPILED
    assert all(forward_of(runner)._is_checked.values())
    expected = {name: generate_with_peft(folder, name and adapter, prompt, 8) for name in (None, "late")}
    assert answers == expected
    assert answers[None] != answers["late"]


def generate(runner: ModelRunner, prompt: list[int], adapter_name: str | None) -> list[int]:
    seq = Sequence(
        "r", 0, adapter_name, SamplingParams(temperature=0), list(prompt), len(prompt), 8, block_table=[3, 1]
    )
    for _ in range(8):
        (drawn,) = runner.run([ScheduledSequence(seq, len(seq.token_ids) - seq.num_computed_tokens)])
        assert isinstance(drawn, SampledToken)
        seq.num_computed_tokens = len(seq.token_ids)
        seq.token_ids.append(drawn.token_id)
    return seq.token_ids[len(prompt) :]
