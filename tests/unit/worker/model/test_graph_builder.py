"""Compiling a graph beside the worker, and finding it again at the next start."""

import fcntl
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import psutil
import pytest
import torch
from torch import nn

from shared.messages import ForwardState, SamplingParams
from shared.settings import WorkerSettings
from tests.compiled import need_kernels, wait_until_compiled
from tests.tiny_models import add_adapter, build_adapter, build_model, generate_with_peft
from tests.waiting import wait_until
from worker.engine.sequence import SampledToken, ScheduledSequence, Sequence
from worker.model.compile_graph import Job
from worker.model.forward import Graph
from worker.model.graph_builder import GraphBuilder, describe_job
from worker.model.prepared import prepare
from worker.model.startup import load_model_runner, load_with_kernels

torch.set_num_threads(1)

WORKER = """
import sys, msgspec
from torch import nn
from worker.model.graph_builder import GraphBuilder, Job
builder = GraphBuilder(nn.Module(), msgspec.json.decode(sys.argv[1], type=Job))
builder.start(print, print)
builder.wait()
"""


class Outcome:
    """The outcome of a builder: a graph, or the reason why there is none."""

    def __init__(self, builder: GraphBuilder) -> None:
        self.graphs: list[Graph] = []
        self.reasons: list[str] = []
        builder.start(self.graphs.append, self.reasons.append)


def build(job: Job, model: nn.Module | None = None) -> Outcome:
    builder = GraphBuilder(model or nn.Module(), job)
    outcome = Outcome(builder)
    builder.wait()
    return outcome


def impossible_job(folder: Path) -> Job:
    return Job(str(folder), "float32", False, [], {}, {}, str(folder / "graph"))


def compilers() -> list[psutil.Process]:
    children = psutil.Process().children()
    return [child for child in children if "compile_graph" in " ".join(child.cmdline())]


class Loaded(NamedTuple):
    """A model that is ready to be compiled."""

    folder: Path
    settings: WorkerSettings
    model: nn.Module
    job: Job


@pytest.fixture
def loaded(tmp_path: Path) -> Loaded:
    need_kernels()
    folder = build_model(tmp_path / "model", "llama")
    settings = WorkerSettings(model=str(folder), device="cpu", dtype="float64")
    model, kernels = load_with_kernels(folder, settings, torch.device("cpu"))
    fused_linears = prepare(model, settings, kernels).fused_linears
    return Loaded(
        folder, settings, model, describe_job(folder, model, fused_linears, trust_remote_code=False)
    )


@pytest.fixture
def job(loaded: Loaded, tmp_path: Path) -> Job:
    """Its output goes to a folder that is empty."""
    return msgspec.structs.replace(loaded.job, output=str(tmp_path / "graph"))


@pytest.fixture
def compiled(loaded: Loaded) -> Iterator[Loaded]:
    runner = load_model_runner(loaded.settings)
    wait_until_compiled(runner)
    yield loaded
    runner.close()


def test_a_model_that_cannot_be_compiled_is_named_with_the_compilers_own_words(tmp_path: Path) -> None:
    outcome = build(impossible_job(tmp_path))
    assert outcome.graphs == []
    (reason,) = outcome.reasons
    assert f"{tmp_path}/graph.log" in reason
    assert "exit code 1" in reason
    assert "Traceback" in (tmp_path / "graph.log").read_text()


def test_closing_ends_the_compiler_and_is_no_failure(tmp_path: Path) -> None:
    builder = GraphBuilder(nn.Module(), impossible_job(tmp_path))
    outcome = Outcome(builder)
    wait_until(lambda: bool(compilers()) or bool(outcome.reasons))
    builder.close()
    assert not compilers()
    assert outcome.reasons == []


def test_a_graph_is_found_again_by_the_next_start(compiled: Loaded) -> None:
    folder = Path(compiled.job.output)
    made = folder.stat().st_ino
    os.utime(folder, (0, 0))
    runner = load_model_runner(compiled.settings)
    wait_until_compiled(runner)
    assert folder.stat().st_ino == made
    assert folder.stat().st_mtime > 0  # so that it is known to be in use


def test_a_damaged_graph_is_compiled_again_by_the_next_start(tmp_path: Path) -> None:
    need_kernels()
    job = impossible_job(tmp_path)
    damaged = Path(job.output) / "graph.so"
    damaged.parent.mkdir()
    damaged.write_bytes(b"cut off")
    (reason,) = build(job).reasons
    assert str(damaged) in reason
    assert not Path(job.output).exists()


def test_loading_a_graph_leaves_nothing_in_the_temporary_folder(compiled: Loaded) -> None:
    found = set(Path(tempfile.gettempdir()).glob("aotinductor_*"))
    assert build(compiled.job, compiled.model).graphs
    assert set(Path(tempfile.gettempdir()).glob("aotinductor_*")) <= found


def test_a_tensor_of_another_precision_than_the_config_says_is_not_compiled(job: Job) -> None:
    name = "model.norm.weight"
    (reason,) = build(
        msgspec.structs.replace(job, tensor_specs=job.tensor_specs | {name: "torch.int8 [48]"})
    ).reasons
    assert f"{name} is torch.int8" in reason


def test_a_killed_worker_leaves_no_compiler_behind(job: Job, tmp_path: Path) -> None:
    """Neither ours nor the g++ that it has started, nor their files."""
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


def test_workers_compile_one_at_a_time_and_a_waiting_one_can_end(tmp_path: Path) -> None:
    with (tmp_path / "compile.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        builder = GraphBuilder(nn.Module(), impossible_job(tmp_path))
        outcome = Outcome(builder)
        builder.close()
        assert "compile" not in {thread.name for thread in threading.enumerate()}
        assert not compilers()
        assert outcome.reasons == []


def test_another_config_or_precision_is_another_graph(loaded: Loaded) -> None:
    def output(model: nn.Module) -> str:
        return describe_job(loaded.folder, model, [], trust_remote_code=False).output

    config = loaded.folder / "config.json"
    first = output(loaded.model)
    assert output(loaded.model) == first
    config.write_bytes(config.read_bytes() + b"\n")
    second = output(loaded.model)
    assert second != first
    assert output(loaded.model.float()) != second


def test_adapters_that_come_after_the_graph_are_used_by_it(loaded: Loaded, tmp_path: Path) -> None:
    runner = load_model_runner(loaded.settings)
    wait_until_compiled(runner)
    adapter = build_adapter(tmp_path / "late", loaded.folder, seed=1, rank=4)

    def generate(adapter_name: str | None) -> list[int]:
        prompt = list(range(5, 16))
        kwargs = {"block_table": [3, 1]}
        seq = Sequence("r", 0, adapter_name, SamplingParams(temperature=0), prompt, len(prompt), 8, **kwargs)
        for _ in range(8):
            (token,) = runner.run([ScheduledSequence(seq, len(seq.token_ids) - seq.num_computed_tokens)])
            assert isinstance(token, SampledToken)
            seq.num_computed_tokens = len(seq.token_ids)
            seq.token_ids.append(token.token_id)
        return seq.output_token_ids

    answers = {None: generate(None)}
    add_adapter(runner, "late", adapter)
    answers["late"] = generate("late")
    assert runner.forward_state == ForwardState.COMPILED
    assert answers == {
        name: generate_with_peft(loaded.folder, name and adapter, range(5, 16), 8) for name in answers
    }
    assert answers[None] != answers["late"]
