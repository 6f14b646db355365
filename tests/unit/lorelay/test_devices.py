"""The GPU or the number of threads that each worker gets."""

import os
from pathlib import Path

import pytest

from lorelay import devices
from shared.errors import ConfigurationError
from shared.settings import WorkerSettings


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("LORELAY_")]:
        monkeypatch.delenv(name)


def worker_settings(**values: object) -> WorkerSettings:
    return WorkerSettings.load(model="m", **values)


def test_each_worker_gets_a_gpu_of_its_own() -> None:
    variables = devices.worker_environments(worker_settings(), 2, ["0", "3", "5"], 8)
    assert variables == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "3"}]


def test_more_workers_than_gpus_are_refused() -> None:
    with pytest.raises(
        ConfigurationError, match="LORELAY_WORKERS: 3 workers need a GPU each, and there are 2"
    ):
        devices.worker_environments(worker_settings(), 3, ["0", "1"], 8)


def test_one_gpu_by_number_serves_one_worker_only() -> None:
    assert devices.worker_environments(worker_settings(device="cuda:1"), 1, ["0", "1"], 8) == [{}]
    with pytest.raises(ConfigurationError, match="LORELAY_DEVICE: 'cuda:1' names one GPU"):
        devices.worker_environments(worker_settings(device="cuda:1"), 2, ["0", "1"], 8)


def test_several_workers_share_the_cores() -> None:
    for gpus, device in (([], "auto"), (["0"], "cpu")):
        variables = devices.worker_environments(worker_settings(device=device), 3, gpus, 8)
        assert variables == [{"LORELAY_NUM_THREADS": "2"}] * 3


def test_one_worker_or_a_chosen_number_of_threads_is_left_alone() -> None:
    assert devices.worker_environments(worker_settings(), 1, [], 8) == [{}]
    assert devices.worker_environments(worker_settings(num_threads=3), 2, [], 8) == [{}, {}]


@pytest.mark.parametrize(
    ("configured", "gpus"), [("0,2", ["0", "2"]), ("GPU-a1", ["GPU-a1"]), ("", []), ("-1", [])]
)
def test_gpus_that_are_hidden_stay_hidden(configured: str, gpus: list[str]) -> None:
    assert devices.visible_gpus({"CUDA_VISIBLE_DEVICES": configured}) == gpus


def test_gpus_are_counted_by_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: H100 (UUID: a)'\necho 'GPU 1: H100 (UUID: b)'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert devices.visible_gpus({}) == ["0", "1"]


@pytest.mark.parametrize("program", ["", "#!/bin/sh\nexit 9\n"])
def test_without_nvidia_smi_the_device_files_are_counted(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    if program:
        (tmp_path / "nvidia-smi").write_text(program)
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}")
    assert devices.visible_gpus({}, dev=tmp_path) == ["0", "1"]
