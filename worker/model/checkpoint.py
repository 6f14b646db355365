"""Describes folders without a plain model, such as those of adapters or quantized models; uses no torch."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.errors import ConfigurationError

_METHODS = {
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "fp8": "FP8",
    "gptq": "GPTQ",
    "mxfp4": "MXFP4",
}
"""Names of common methods, by the value of `quant_method`."""
_QUANTIZATION_FILES = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "ModelOpt",
}
"""Files beside the config in which older tools describe the quantization."""
_QUANTIZED_TENSOR = re.compile(
    r".*\.(qweight|qzeros|g_idx|weight_packed|weight_scale(_inv)?|weight_blocks|\w*_blocks|absmax|SCB|quant_state\S*)"
)
_MAX_HEADER_BYTES = 100_000_000


def check_model(folder: Path, name: str) -> None:
    """Checks that a folder has a model whose weights transformers can load, and which is not quantized.

    Raises:
        ConfigurationError: the folder has an adapter, a quantized model, or no model. The message says which
            of these it is, and how to serve it.
    """
    if (folder / "adapter_config.json").exists():
        raise ConfigurationError(f"LORELAY_MODEL: {name} {_describe_adapter(folder, name)}")
    if not (folder / "config.json").is_file():
        raise ConfigurationError(f"LORELAY_MODEL: {name} {_describe_other(folder)}")
    if (found := _quantization(folder)) is not None:
        method, where = found
        raise ConfigurationError(
            f"LORELAY_MODEL: {name} is quantized with {method} ({where}), which is not served: serve the "
            "unquantized model, in bfloat16, float16 or float32"
        )


def describe_no_adapter(folder: Path) -> str:
    """Describes the content of a folder that should have an adapter, but has no `adapter_config.json`."""
    if (folder / "config.json").exists():
        return "is not an adapter: it has no adapter_config.json, but is a whole model; serve it as MODEL"
    if inner := _inner_adapters(folder):
        return f"is not an adapter: it has no adapter_config.json, but {inner} has; give that folder"
    return "is not an adapter: it has no adapter_config.json"


def _describe_adapter(folder: Path, name: str) -> str:
    base = _read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "BASE"
    if (folder / "config.json").exists() and _has_model_weights(folder):
        return (
            "has both a model and a LoRA adapter (adapter_config.json), and it is unclear which is meant: "
            "move one of them into a folder of its own"
        )
    adapter = Path(name).name if folder.name == Path(name).name else name.rpartition("/")[2]
    return f"is a LoRA adapter for {base}: serve {base} with --adapters {adapter.partition('@')[0]}={name}"


def _describe_other(folder: Path) -> str:
    if next(folder.glob("*.gguf"), None) is not None:
        return (
            "is a GGUF model, which is not served: serve the original model, with config.json and safetensors"
        )
    if inner := _inner_adapters(folder):
        return f"is not a model: it has no config.json; {inner} is a LoRA adapter, to be given to --adapters"
    return "is not a model: it has no config.json"


def _inner_adapters(folder: Path) -> str | None:
    """Returns the newest checkpoint of an adapter in this folder of a training run."""
    checkpoints = [path.parent for path in folder.glob("*/adapter_config.json")]
    return max(checkpoints, key=lambda path: path.stat().st_mtime).name if checkpoints else None


def _has_model_weights(folder: Path) -> bool:
    names = {path.name for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern)}
    return any(not name.startswith(("adapter_", "training_args", "optimizer", "scheduler")) for name in names)


def _quantization(folder: Path) -> tuple[str, str] | None:
    """Returns the method of quantization and the place that names it; None if the model is not quantized."""
    config = _read_json(folder / "config.json")
    inner = [(f"{key}.", value) for key, value in config.items() if isinstance(value, dict)]
    for prefix, part in (("", config), *inner):
        for field in ("quantization_config", "compression_config", "quantization"):
            if settings := part.get(field):
                return _method(settings), f"config.json: {prefix}{field}"
    for name, method in _QUANTIZATION_FILES.items():
        if (folder / name).is_file():
            return method, name
    for file in sorted(folder.glob("*.safetensors"))[:1]:
        for tensor in _tensor_names(file):
            if _QUANTIZED_TENSOR.fullmatch(tensor):
                return "an unknown method", f"{file.name}: {tensor}"
    return None


def _method(settings: Any) -> str:
    if not isinstance(settings, Mapping):
        return str(settings)
    method = settings.get("quant_method") or settings.get("quant_algo") or settings.get("quant_type")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"
    if method is None and settings.keys() >= {"group_size", "bits"}:
        method = "MLX or GPTQ"
    return _METHODS.get(str(method).lower(), str(method or "an unknown method"))


def _tensor_names(file: Path) -> list[str]:
    """Returns the names of the tensors in a safetensors file; an empty list if its header can't be read."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(size)) if size <= _MAX_HEADER_BYTES else {}
        except ValueError:  # loading the file says what is wrong with it
            return []
    return list(header) if isinstance(header, dict) else []


def _read_json(file: Path) -> dict[str, Any]:
    """Returns the object in a JSON file, or an empty object."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
