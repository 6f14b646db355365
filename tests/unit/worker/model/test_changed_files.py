"""Weight files that change on disk before, while and after a worker loads them."""

import logging
import os
import shutil
from pathlib import Path

import pytest
import torch

from shared.errors import ConfigurationError
from shared.settings import WorkerSettings
from tests.tiny_models import build_model
from tests.waiting import wait_until
from worker.model import loading, startup
from worker.model.file_watch import FileWatch
from worker.model.loading import load_model
from worker.model.startup import load_model_runner
from worker.model.versions import model_version, weight_stamps

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and another fine-tune of the same sizes."""
    folder = tmp_path_factory.mktemp("models")
    return build_model(folder / "first"), build_model(folder / "second", seed=1)


@pytest.fixture
def folder(models: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(models[0], tmp_path / "served"))


def settings(folder: Path) -> WorkerSettings:
    return WorkerSettings(model=str(folder), device="cpu", compile="off", cache_max_bytes=2**20)


def overwrite(folder: Path, other: Path) -> None:
    """Writes other weights into the same file, and sets its time back, as `cp -p` does."""
    file, weights = folder / "model.safetensors", (other / "model.safetensors").read_bytes()
    stat = file.stat()
    with file.open("r+b") as stream:
        stream.write(weights)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_loaded_model_keeps_its_weights_if_the_file_is_overwritten_or_truncated(
    folder: Path, models: tuple[Path, Path]
) -> None:
    model = load_model(folder, settings(folder), CPU)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    overwrite(folder, models[1])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    os.truncate(folder / "model.safetensors", 0)  # a page of the file would now end the process by SIGBUS
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    folder = build_model(tmp_path, tie_word_embeddings=True)
    model = load_model(folder, settings(folder), CPU)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_another_fine_tune_of_the_same_sizes_has_another_version(
    folder: Path, models: tuple[Path, Path]
) -> None:
    before = model_version(folder)
    assert before == model_version(models[0])
    overwrite(folder, models[1])
    assert model_version(folder) == model_version(models[1]) != before


def test_files_that_change_while_they_are_read_are_refused(
    folder: Path, models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    load = loading.load_model

    def load_and_change(*args: object) -> object:
        model = load(*args)  # type: ignore[arg-type]
        overwrite(folder, models[1])
        return model

    monkeypatch.setattr(startup.loading, "load_model", load_and_change)
    with pytest.raises(ConfigurationError, match=r"LORELAY_MODEL: .* changed while they were read"):
        load_model_runner(settings(folder))


@pytest.mark.parametrize("size", [0, 4, 5000])
def test_a_truncated_file_is_refused_by_its_setting(folder: Path, size: int) -> None:
    os.truncate(folder / "model.safetensors", size)
    with pytest.raises(ConfigurationError, match=r"LORELAY_MODEL.* doesn't load"):
        load_model(folder, settings(folder), CPU)


def test_a_change_while_the_model_is_served_is_logged_once(
    folder: Path, models: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    watch = FileWatch(folder, weight_stamps(folder))
    assert not watch.check()
    overwrite(folder, models[1])
    assert watch.check()
    assert not watch.check()
    (folder / "model.safetensors").unlink()
    assert watch.check()
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert all("model.safetensors changed on disk" in text for text in warnings)


def test_a_change_is_noticed_without_a_call(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    watch = FileWatch(folder, weight_stamps(folder), interval_s=0.01)
    watch.start()
    (folder / "model.safetensors").touch()
    wait_until(lambda: "model.safetensors changed on disk" in caplog.text)
    watch.close()
