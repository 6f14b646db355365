"""Folders that are no plain model are refused by what they are."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from shared.errors import AdapterError, ConfigurationError
from shared.settings import WorkerSettings
from worker.model.adapter_files import load_adapter
from worker.model.loading import find_model

ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}


def write(folder: Path, **files: Any) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def refusal(model: Path | str, **settings: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        find_model(WorkerSettings(model=str(model), **settings))
    return caught.value.message


def test_an_adapter_given_as_the_model_is_named_with_its_base(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    write(folder, adapter_config=ADAPTER)
    advice = f"is a LoRA adapter for org/base: serve org/base with --adapters mine={folder}"
    assert refusal(folder) == f"LORELAY_MODEL: {folder} {advice}"
    (folder / "adapter_config.json").write_text("{")
    assert "serve BASE with --adapters mine=" in refusal(folder)


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin", "model-1-of-2.safetensors"])
def test_a_folder_with_a_model_and_an_adapter_is_refused(tmp_path: Path, weights: str) -> None:
    """transformers would load the adapter's base, with the adapter, instead of the model."""
    write(tmp_path, adapter_config=ADAPTER, config={})
    assert "is a LoRA adapter" in refusal(tmp_path)
    (tmp_path / weights).touch()
    assert "has both a model and a LoRA adapter" in refusal(tmp_path)


def test_folders_without_a_model_are_refused_by_what_they_have(tmp_path: Path) -> None:
    assert refusal(tmp_path).endswith("is not a model: it has no config.json")
    (tmp_path / "checkpoint-20").mkdir()
    write(tmp_path / "checkpoint-20", adapter_config=ADAPTER)
    assert "checkpoint-20 is a LoRA adapter, to be given to --adapters" in refusal(tmp_path)
    (tmp_path / "model.Q4_K_M.gguf").touch()
    assert "is a GGUF model" in refusal(tmp_path)


def test_a_model_given_as_an_adapter_is_refused_by_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-20").mkdir()
    write(tmp_path / "checkpoint-20", adapter_config=ADAPTER)
    with pytest.raises(AdapterError, match=r"no adapter_config.json, but checkpoint-20 has; give"):
        load_adapter("mine", str(tmp_path), torch.nn.Module())
    write(tmp_path, config={})
    with pytest.raises(AdapterError, match=r"'mine' .* is not an adapter: .* serve it as MODEL"):
        load_adapter("mine", str(tmp_path), torch.nn.Module())


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"quant_method": "gptq", "bits": 4}, "GPTQ"),
        ({"quant_method": "awq"}, "AWQ"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "FP8"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "mxfp4"}, "MXFP4"),
        ({"quant_method": "hqq"}, "hqq"),
        ({"quant_algo": "NVFP4"}, "NVFP4"),
        ({"group_size": 64, "bits": 4}, "MLX or GPTQ"),
        ({"something": 1}, "an unknown method"),
    ],
)
@pytest.mark.parametrize("field", ["quantization_config", "compression_config", "quantization"])
def test_a_quantized_model_is_refused_by_its_method(
    tmp_path: Path, field: str, settings: dict[str, Any], method: str
) -> None:
    write(tmp_path, config={"model_type": "llama", field: settings})
    expected = f"is quantized with {method} (config.json: {field}), which is not served: serve the"
    assert expected in refusal(tmp_path)
    write(tmp_path, config={"text_config": {field: settings}})
    assert f"is quantized with {method} (config.json: text_config.{field})" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "method"),
    [("quantize_config", "GPTQ"), ("quant_config", "AWQ"), ("hf_quant_config", "ModelOpt")],
)
def test_older_files_of_quantization_are_known(tmp_path: Path, name: str, method: str) -> None:
    write(tmp_path, config={}, **{name: {"bits": 4}})
    assert f"is quantized with {method} ({name}.json)" in refusal(tmp_path)


@pytest.mark.parametrize(
    "tensor", ["qweight", "weight_packed", "weight_scale_inv", "weight.absmax", "gate_up_proj_blocks", "SCB"]
)
def test_a_quantized_model_is_known_by_its_tensors(tmp_path: Path, tensor: str) -> None:
    write(tmp_path, config={})
    save_file({f"model.layers.0.mlp.{tensor}": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert f"(model.safetensors: model.layers.0.mlp.{tensor})" in refusal(tmp_path)


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"quantization_config": {}}])
def test_a_plain_model_is_found(tmp_path: Path, config: dict[str, Any]) -> None:
    write(tmp_path, config=config)
    save_file({"model.layers.0.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert find_model(WorkerSettings(model=str(tmp_path))) == tmp_path
    (tmp_path / "model.safetensors").write_bytes(b"damaged, which loading reports")
    assert find_model(WorkerSettings(model=str(tmp_path))) == tmp_path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """A hub whose snapshots are folders; returns a function that adds one."""

    def snapshot(repository: str, revision: str | None, allow_patterns: list[str]) -> str:
        folder = tmp_path / "hub" / repository / (revision or "main")
        if not folder.is_dir():
            raise OSError(f"no {revision} in {repository}")
        return str(folder)

    def add(repository: str, revision: str) -> Path:
        folder = tmp_path / "hub" / repository / revision
        folder.mkdir(parents=True)
        return folder

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return add


def test_a_model_is_downloaded_in_the_revision_after_the_at(hub: Callable[[str, str], Path]) -> None:
    folder = write(hub("org/base", "v2"), config={})
    settings = WorkerSettings(model="org/base@v2")
    assert find_model(settings) == folder
    assert settings.base_name == "org/base"
    assert find_model(WorkerSettings(model="org/base", revision="v2")) == folder
    assert "LORELAY_REVISION: v1 is another revision than that of org/base@v2" in refusal(
        "org/base@v2", revision="v1"
    )
    assert "no v3 in org/base" in refusal("org/base@v3")


def test_a_local_folder_may_have_an_at_in_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "base@v2").mkdir(parents=True)
    write(tmp_path / "org" / "base@v2", config={})
    monkeypatch.chdir(tmp_path)
    assert find_model(WorkerSettings(model="org/base@v2")) == Path("org/base@v2")


@pytest.mark.parametrize("revision", ["v2", "0123abc", "refs/pr/1"])
def test_an_adapter_is_downloaded_in_the_revision_after_the_at(
    hub: Callable[[str, str], Path], revision: str
) -> None:
    write(hub("org/mine", revision), adapter_config={"peft_type": "PROMPT_TUNING"})
    (source,) = WorkerSettings(model="base", adapters=f"mine=org/mine@{revision}").adapters
    with pytest.raises(AdapterError, match=rf"at org/mine@{revision}: is not a LoRA adapter"):
        load_adapter(source.name, source.path, torch.nn.Module())


def test_an_adapter_without_a_name_is_called_without_its_revision() -> None:
    (source,) = WorkerSettings(model="base", adapters="org/mine@v2").adapters
    assert source == ("mine", "org/mine@v2")


def test_a_missing_revision_is_refused() -> None:
    for values in ({"model": "base", "adapters": "mine=org/mine@"}, {"model": "org/base@"}):
        with pytest.raises(ConfigurationError, match="names no revision after the @"):
            WorkerSettings.load(**values)
