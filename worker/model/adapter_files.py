"""Reads LoRA adapters from disk with PEFT, and checks that they fit the model."""

import copy
import json
import logging
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from shared.errors import AdapterError
from shared.logs import fields
from shared.paths import expand_home, split_revision
from worker.model import adapter_mismatch, adapter_tokenizer
from worker.model.adapter_patterns import PatternProblem, Patterns, check_patterns
from worker.model.checked_files import FileProblem, check_archive, check_size, read_json, tensor_shapes
from worker.model.checkpoint import describe_no_adapter
from worker.model.loading import download, looks_like_path
from worker.model.memory import num_free_bytes
from worker.model.versions import adapter_version

logger = logging.getLogger(__name__)

CONFIG_FILE = "adapter_config.json"
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")

_SERVED = frozenset(
    {"r", "lora_alpha", "target_modules", "exclude_modules", "use_rslora", "layers_to_transform"}
    | {"layers_pattern", "rank_pattern", "alpha_pattern", "peft_type"}
)
"""Fields of the config that change the output and are supported."""
_WITHOUT_EFFECT = frozenset(
    {"lora_dropout", "inference_mode", "task_type", "base_model_name_or_path", "revision", "peft_version"}
    | {"auto_mapping", "runtime_config", "fan_in_fan_out", "megatron_core", "megatron_config"}
    | {"loftq_config", "eva_config", "qalora_group_size", "ensure_weight_tying"}
)
"""Fields of the config that matter only in training, or only if another field turns a feature on."""
_SERVED_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` with which training leaves the base weights unchanged."""
_KEY = re.compile(r"(?:base_model\.model\.)?(?P<layer>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")


class LayerWeights(NamedTuple):
    """An adapter's weights for one Linear; the adapter adds scaling · b (a x) to the Linear's output."""

    a: Tensor
    """Shape (rank, in)."""
    b: Tensor
    """Shape (out, rank)."""
    scaling: float


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter in host memory, checked against the model."""

    path: str
    folder: Path
    version: str
    """SHA-256 (hex) of the adapter's config and weights."""
    layers: Mapping[str, LayerWeights]
    """The weights for each Linear that the adapter changes, by the Linear's name in the model."""


class _Problem(Exception):
    """A reason to refuse an adapter; `load_adapter` puts the adapter's name and path before the reason."""


def load_adapter(
    name: str,
    path: str,
    model: nn.Module,
    base_name: str = "",
    folder: Path | None = None,
    patterns: Patterns | None = None,
) -> LoadedAdapter:
    """Reads the adapter at `path` (folder or Hugging Face id) for `model`, a transformers model.

    If all shapes fit, but the adapter's config names another base model than `base_name`, a warning is
    logged. If `folder` is given, the adapter is read from this folder, because `path` may lead to a newer
    version by now. `patterns` first tries the config's regular expressions within a time limit.

    Raises:
        AdapterError: the adapter can't be served; the message has name, path and reason.
    """
    try:
        folder = folder or _find(path)
        stamps = _stamps(folder)
        config, weight_file = _read_config(folder), _weight_file(folder)
        check_patterns(config, [layer for layer, _ in model.named_modules()], patterns)
        _check_before_reading(weight_file, folder, config, model)
        layers = _read_layers(folder, _read_weights(weight_file), config, model)
        version = adapter_version(folder / CONFIG_FILE, weight_file)
        if _stamps(folder) != stamps:
            raise _Problem("its files changed while they were read")
    except (_Problem, FileProblem, PatternProblem) as problem:
        raise AdapterError(f"adapter {name!r} at {path}: {problem}") from problem
    # PEFT, pickle and json may raise any exception here, because the files may be damaged in any way.
    except Exception as error:
        raise AdapterError(
            f"adapter {name!r} at {path}: can't be read: {type(error).__name__}: {error}"
        ) from error
    declared = str(config.get("base_model_name_or_path") or "")
    if declared and base_name and _last_part(declared) != _last_part(base_name):
        logger.warning(
            "adapter %r at %s declares the base model %s, but is served on %s, because all shapes fit",
            name,
            path,
            declared,
            base_name,
            extra=fields("load_adapter", adapter_name=name),
        )
    return LoadedAdapter(path, folder, version, layers)


def _find(path: str) -> Path:
    try:
        folder = expand_home(path)
        repository, revision = split_revision(path)
    except ValueError as error:
        raise _Problem(str(error)) from error
    if folder.is_dir():
        return folder
    if folder.exists():
        raise _Problem("is a file, not a folder")
    if looks_like_path(repository):
        raise _Problem("the folder does not exist")
    try:
        return download(repository, revision, [CONFIG_FILE, *WEIGHT_FILES, *adapter_tokenizer.FILES])
    except (OSError, ValueError) as error:
        raise _Problem(
            f"is neither a local folder nor a repository that can be downloaded: {error}"
        ) from error


def _read_config(folder: Path) -> dict[str, Any]:
    """Returns the contents of `adapter_config.json`; refuses a config with features that are not served."""
    try:
        config = read_json(folder / CONFIG_FILE)
    except FileNotFoundError as error:
        raise _Problem(describe_no_adapter(folder)) from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise _Problem(f"is not a LoRA adapter: its peft_type is {kind!r}")
    _refuse_features(config)
    return dict(config)


def _refuse_features(config: Mapping[str, Any]) -> None:
    """Raises an error for all features except plain LoRA, and for fields that PEFT does not know."""
    if config.get("use_dora"):
        raise _Problem("uses DoRA, which is not served")
    if config.get("init_lora_weights", True) not in _SERVED_INITS:
        raise _Problem(
            f"was trained on changed base weights (init_lora_weights={config['init_lora_weights']!r}); "
            "save it converted to plain LoRA"
        )
    for field, value in config.items():
        if field in _SERVED | _WITHOUT_EFFECT | {"init_lora_weights"} or not value:
            continue
        if (field, value) != ("bias", "none"):
            raise _Problem(f"uses {field}={value!r}, which is not served")


def _weight_file(folder: Path) -> Path:
    for file_name in WEIGHT_FILES:
        if os.path.lexists(folder / file_name):
            return folder / file_name
    raise _Problem(f"has no weights: neither {' nor '.join(WEIGHT_FILES)}")


def _check_before_reading(file: Path, folder: Path, config: Mapping[str, Any], model: nn.Module) -> None:
    """Raises an error if a file is not regular, is too large for the memory, or has unexpected shapes."""
    check_size(file, num_free_bytes(torch.device("cpu")) // 2)
    if file.suffix != ".safetensors":
        check_archive(file)
        return
    shapes = {name: shape for name, shape in tensor_shapes(file).items() if _KEY.fullmatch(name)}
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    _read_layers(folder, weights, config, model)


def _read_weights(file: Path) -> dict[str, Tensor]:
    from peft.utils import load_peft_weights
    from safetensors.torch import load

    try:
        if file.suffix == ".safetensors":
            # PEFT would let safetensors open the file: version 0.8.0 then leaks two objects per tensor.
            weights = load(file.read_bytes())
        else:
            weights = dict(load_peft_weights(str(file.parent), device="cpu"))
    # For a damaged file, safetensors and pickle raise exceptions that have no base class in common.
    except Exception as error:
        raise _Problem(f"its weights can't be read: {error}") from error
    for key, tensor in weights.items():
        if not tensor.is_floating_point():
            raise _Problem(f"{file.name}: {key} is {tensor.dtype}; only floating-point weights are served")
    return weights


def _read_layers(
    folder: Path, weights: Mapping[str, Tensor], config: Mapping[str, Any], model: nn.Module
) -> dict[str, LayerWeights]:
    stored = _by_layer(weights, model)
    found = dict(stored)
    expected = _known_layers(folder, config, model)
    declared = config.get("base_model_name_or_path")
    for layer, (rank, num_inputs, num_outputs, _) in expected.items():
        for side, shape in (("A", (rank, num_inputs)), ("B", (num_outputs, rank))):
            tensor = stored.pop((layer, side), None)
            if tensor is None:
                advice = adapter_mismatch.advice({name for name, _ in found}, expected.keys())
                raise _Problem(f"has no lora_{side} weights for {layer}, which its config names; {advice}")
            if tuple(tensor.shape) != shape:
                raise _Problem(
                    f"made for another base: it declares base {declared}, the shape of {layer}.lora_{side} "
                    f"is {tuple(tensor.shape)}, this model's is {shape}"
                )
    if stored:
        layer, side = next(iter(stored))
        raise _Problem(
            f"has weights for {layer}.lora_{side}, which its config doesn't name or this model doesn't have "
            f"(it declares base {declared})"
        )
    return {
        layer: LayerWeights(found[layer, "A"], found[layer, "B"], shape.scaling)
        for layer, shape in expected.items()
    }


def _by_layer(weights: Mapping[str, Tensor], model: nn.Module) -> dict[tuple[str, str], Tensor]:
    found: dict[tuple[str, str], Tensor] = {}
    for key, tensor in weights.items():
        match = _KEY.fullmatch(key)
        if match is not None:
            found[match["layer"], match["side"]] = tensor
        elif (difference := adapter_mismatch.from_base(key, tensor, model)) is not None:
            raise _Problem(f"has weights that are not plain LoRA: {key}{difference}")
    return found


class _ExpectedLayer(NamedTuple):
    """Shapes and scaling of an adapter's weights for one layer, according to its config."""

    rank: int
    num_inputs: int
    num_outputs: int
    scaling: float


_MAX_NUM_CONFIGS = 64
_layers_by_config: WeakKeyDictionary[nn.Module, dict[str, dict[str, _ExpectedLayer]]] = WeakKeyDictionary()


def _known_layers(folder: Path, config: Mapping[str, Any], model: nn.Module) -> dict[str, _ExpectedLayer]:
    """Returns the result of `_expected_layers`, cached by config.

    Without the cache, `_expected_layers` would take most of the time that it takes to read an adapter.
    """
    known = _layers_by_config.setdefault(model, {})
    # PEFT writes sets as lists in random order; without sorting, equal configs would have different keys.
    relevant = {
        name: sorted(value) if name.endswith("_modules") and isinstance(value, list) else value
        for name, value in config.items()
        if name not in _WITHOUT_EFFECT
    }
    key = json.dumps(relevant, sort_keys=True)
    if key not in known:
        expected = _expected_layers(folder, model)
        if len(known) == _MAX_NUM_CONFIGS:
            known.clear()
        known[key] = expected
    return known[key]


def _expected_layers(folder: Path, model: nn.Module) -> dict[str, _ExpectedLayer]:
    """Returns the layers that PEFT changes when it applies the config to a copy of the model on `meta`."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import Linear, LoraLayer

    try:
        # PEFT's warnings here concern training or deprecated attributes of transformers, so they are ignored.
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            config = LoraConfig.from_pretrained(str(folder))
            config.init_lora_weights = False
            skeleton = type(model)(copy.deepcopy(model.config))
            adapted = inject_adapter_in_model(config, skeleton, low_cpu_mem_usage=True)
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
        raise _Problem(f"PEFT can't apply it to this model: {error}") from error
    found: dict[str, _ExpectedLayer] = {}
    for layer, module in adapted.named_modules():
        if isinstance(module, LoraLayer):
            base = module.get_base_layer()
            if not (isinstance(module, Linear) and isinstance(base, nn.Linear)):
                raise _Problem(f"changes {layer}, a {type(base).__name__}; only Linear layers are served")
            (rank,), (scaling,) = module.r.values(), module.scaling.values()
            found[layer] = _ExpectedLayer(rank, base.in_features, base.out_features, float(scaling))
    return found


def _stamps(folder: Path) -> list[tuple[int, int, int]]:
    """Returns inode, size and modification time of each file, which show whether a file has changed."""
    files = (folder / name for name in (CONFIG_FILE, *WEIGHT_FILES))
    found = [file.stat() for file in files if file.exists()]
    return [(stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in found]


def _last_part(name: str) -> str:
    return name.partition("@")[0].rstrip("/").rpartition("/")[2].lower()
