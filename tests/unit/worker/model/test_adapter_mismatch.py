"""Copies of the base's tensors, and advice for adapters that lack tensors."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from shared.errors import AdapterError
from tests.tiny_models import build_adapter, build_model, change_json
from worker.model.adapter_files import LoadedAdapter, load_adapter

NUM_LAYERS = 4
HEAD, EMBEDDING = "base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=NUM_LAYERS)


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_adapter(tmp_path_factory.mktemp("adapters") / "plain", base)


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "mine"))


def add(folder: Path, **tensors: torch.Tensor) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file) | {key: tensor.contiguous() for key, tensor in tensors.items()}, file)


def load(folder: Path, model: Any) -> LoadedAdapter:
    return load_adapter("mine", str(folder), model)


PRECISIONS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("served", PRECISIONS)
@pytest.mark.parametrize("trained", PRECISIONS)
@pytest.mark.parametrize("original", [torch.float32, torch.bfloat16])
def test_a_copy_of_the_head_or_the_embeddings_may_be_of_another_precision(
    folder: Path, model: Any, served: torch.dtype, trained: torch.dtype, original: torch.dtype
) -> None:
    model.to(original)
    tensors = {HEAD: model.lm_head.weight.data, EMBEDDING: model.model.embed_tokens.weight.data}
    tensors[HEAD][0] = 3e-7  # below the normal numbers of float16
    add(folder, **{key: tensor.to(trained) for key, tensor in tensors.items()})
    assert load(folder, model.to(served)).layers
    model.to(torch.float32)


@pytest.mark.parametrize("stored", PRECISIONS)
def test_a_trained_head_is_refused_with_the_way_out(folder: Path, model: Any, stored: torch.dtype) -> None:
    trained = model.to(torch.float32).lm_head.weight.data.clone()
    trained[5, 7] += 0.02
    add(folder, **{HEAD: trained.to(stored)})
    with pytest.raises(AdapterError, match=r"lm_head.weight differs from the base's .* merge it into"):
        load(folder, model)


def test_a_head_for_more_tokens_is_refused_with_both_shapes(folder: Path, model: Any) -> None:
    rows = len(model.lm_head.weight)
    add(folder, **{HEAD: torch.ones(rows + 2, 48)})
    with pytest.raises(AdapterError, match=rf"the shape \({rows + 2}, 48\), the base's is \({rows}, 48\)"):
        load(folder, model)


def lose(folder: Path, *words: str) -> None:
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    kept = {key: tensor for key, tensor in weights.items() if not any(word in key for word in words)}
    save_file(kept, file)


@pytest.mark.parametrize(
    ("lost", "advice"),
    [
        (
            (".2.", ".3."),
            r"none for the layers 2-3\. .* write \"layers_to_transform\": \[0, 1\] into",
        ),
        ((".0.", ".2."), r"none for the layers 0, 2\. .* \"layers_to_transform\": \[1, 3\]"),
        (("q_proj",), r"if the adapter doesn't change q_proj, remove that from target_modules"),
        ((".1.self_attn.q_proj",), r"which its config names; if they were lost, save or download"),
        (("1.self_attn.q_proj.lora_B",), r"no lora_B weights for model.layers.1.self_attn.q_proj"),
    ],
)
def test_an_adapter_that_lacks_tensors_is_refused_with_the_way_to_mend_it(
    folder: Path, model: Any, lost: tuple[str, ...], advice: str
) -> None:
    lose(folder, *lost)
    with pytest.raises(AdapterError, match=advice):
        load(folder, model)


def test_the_advice_mends_the_adapter(folder: Path, model: Any) -> None:
    lose(folder, ".2.", ".3.")
    change_json(folder / "adapter_config.json", layers_to_transform=[0, 1])
    assert len(load(folder, model).layers) == 4
