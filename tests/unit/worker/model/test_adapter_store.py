"""Reading adapters that the disk gives badly; `test_lora` says what else is refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from transformers import AutoModelForCausalLM

from shared.errors import AdapterError
from tests.fakes import served_models
from tests.tiny_models import build_adapter, build_model, change_json
from worker.engine.served_models import ServedModels
from worker.model.adapter_files import CONFIG_FILE, WEIGHT_FILES, LoadedAdapter, load_adapter
from worker.model.adapter_store import AdapterStore
from worker.model.kernels.products import number_linears
from worker.model.lora import LoraStack, SlotWeights, linears


class CrampedStack(LoraStack):
    """Runs out of memory when it is told to."""

    is_full = False

    def prepare(self, name: str, adapter: LoadedAdapter) -> SlotWeights:
        if self.is_full:
            raise RuntimeError("can't allocate memory")
        return super().prepare(name, adapter)


@pytest.fixture
def model(tmp_path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(build_model(tmp_path / "model"))


@pytest.fixture
def stack(model: Any) -> CrampedStack:
    return CrampedStack(model, number_linears([[name] for name in linears(model)], []), model.dtype)


@pytest.fixture
def served() -> ServedModels:
    return served_models()


@pytest.fixture
def store(model: Any, stack: CrampedStack, served: ServedModels) -> AdapterStore:
    return AdapterStore(model, "tiny", stack, served)


@pytest.fixture
def folder(store: AdapterStore, tmp_path: Path) -> Path:
    return build_adapter(tmp_path / "adapter", tmp_path / "model")


def test_a_file_that_cannot_be_read_is_told_with_the_adapters_name_at_the_start_and_later(
    store: AdapterStore, served: ServedModels, folder: Path
) -> None:
    served.add(store.read_new("good", str(folder)).model)
    config = (folder / CONFIG_FILE).read_bytes()
    (folder / CONFIG_FILE).unlink()
    (folder / CONFIG_FILE).mkdir()
    with pytest.raises(AdapterError, match=r"'bad' at .*adapter_config.json is no regular file"):
        store.read_new("bad", str(folder))
    with pytest.raises(AdapterError, match=r"'good' at .*adapter_config.json is no regular file"):
        store.read("good")
    (folder / CONFIG_FILE).rmdir()
    (folder / CONFIG_FILE).write_bytes(config)
    store.read("good")


def test_an_adapter_that_was_read_is_served_only_once_it_is_added(
    store: AdapterStore, served: ServedModels, folder: Path
) -> None:
    model, weights = store.read_new("mine", str(folder))
    assert (model.name, model.source, model.adapter_name) == ("mine", str(folder), "mine")
    assert weights.num_bytes > 0
    assert not served.adapters
    with pytest.raises(AdapterError, match="not loaded"):
        store.read("mine")
    served.add(model)
    assert store.read("mine").num_bytes == weights.num_bytes


def test_an_adapter_whose_files_changed_is_refused_when_it_is_read_again(
    store: AdapterStore, served: ServedModels, folder: Path
) -> None:
    served.add(store.read_new("mine", str(folder)).model)
    store.read("mine")
    change_json(folder / CONFIG_FILE, lora_alpha=77)
    with pytest.raises(AdapterError, match=r"'mine' at .* have changed"):
        store.read("mine")
    shutil.rmtree(folder)
    with pytest.raises(AdapterError, match=r"'mine' at .* it has no adapter_config.json"):
        store.read("mine")


def test_a_lack_of_memory_is_told_with_the_adapters_name_at_the_start_and_later(
    store: AdapterStore, stack: CrampedStack, served: ServedModels, folder: Path
) -> None:
    served.add(store.read_new("good", str(folder)).model)
    stack.is_full = True
    with pytest.raises(AdapterError, match=r"'bad' at .*can't allocate memory"):
        store.read_new("bad", str(folder))
    with pytest.raises(AdapterError, match=r"'good' at .*can't allocate memory"):
        store.read("good")


@torch.inference_mode()
def test_a_cleared_slot_changes_no_output(
    store: AdapterStore, stack: CrampedStack, model: Any, folder: Path
) -> None:
    def logits() -> torch.Tensor:
        stack.set_rows([(1, 3)], [2])
        return model(torch.tensor([[1, 2, 3]])).logits

    plain = logits()
    store.put("mine", store.read_new("mine", str(folder)).weights, 1)
    assert not torch.equal(logits(), plain)
    store.clear(1)
    assert torch.equal(logits(), plain)


def test_weights_that_are_replaced_while_they_are_read_are_refused(
    store: AdapterStore, model: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = build_adapter(tmp_path / "other", tmp_path / "model", seed=7)

    def load_slowly(data: bytes) -> object:
        shutil.copy(other / WEIGHT_FILES[0], folder / WEIGHT_FILES[0])
        return load(data)

    monkeypatch.setattr("safetensors.torch.load", load_slowly)
    with pytest.raises(AdapterError, match="changed while they were read"):
        store.read_new("a", str(folder))
    assert load_adapter("other", str(other), model).version
