"""Loads the parts of a `ModelRunner` (model, kernels, adapters, graph) in the order of their dependencies."""

import contextlib
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from shared.control_groups import num_usable_cores
from shared.errors import AdapterError, ConfigurationError
from shared.logs import fields
from shared.setting_lists import AdapterSource
from shared.settings import WorkerSettings
from worker.engine.adapter_cache import AdapterCache
from worker.engine.served_models import ServedModel, ServedModels
from worker.model import loading, memory
from worker.model.adapter_store import AdapterStore
from worker.model.file_watch import FileWatch
from worker.model.forward import CompiledForward, EagerForward, Forward
from worker.model.graph_builder import GraphBuilder, describe_job
from worker.model.kernels import build_cache, native
from worker.model.kernels.native import KernelState
from worker.model.lora import SlotWeights
from worker.model.model_runner import ModelRunner
from worker.model.prepared import PreparedModel, prepare
from worker.model.tokenizer import Tokenizer
from worker.model.versions import model_version, weight_stamps

logger = logging.getLogger(__name__)


def load_model_runner(settings: WorkerSettings) -> ModelRunner:
    """Loads the model and the adapters that `settings` name.

    Raises:
        ConfigurationError: something can't be loaded; the message names the setting and the reason.
    """
    # Torch counts the machine's cores, whatever share of their time the control group gets.
    torch.set_num_threads(settings.num_threads or min(torch.get_num_threads(), num_usable_cores()))
    logger.info("limits: %s", memory.describe_limits(), extra=fields("limits"))
    device = loading.find_device(settings.device)
    folder = loading.find_model(settings)
    tokenizer = Tokenizer.load(
        folder,
        trust_remote_code=settings.trust_remote_code,
        parses_control_tokens=settings.control_tokens_in_text,
    )
    stamps = weight_stamps(folder)
    model, kernels = load_with_kernels(folder, settings, device)
    prepared = prepare(model, settings, kernels)
    version, created = model_version(folder), int(time.time())
    if weight_stamps(folder) != stamps:
        raise ConfigurationError(
            f"LORELAY_MODEL: the files in {folder} changed while they were read; start the worker again"
        )
    served = ServedModels(ServedModel(settings.base_name, version, settings.model, tokenizer, created))
    store = AdapterStore(model, settings.model, prepared.lora, served)
    adapter_cache = _build_adapter_cache(store, settings, device)
    _load_adapters(store, adapter_cache, served, settings.adapters)
    has_graph = kernels is not None and settings.compile == "graph"
    forward = _compile(folder, prepared, settings) if has_graph else EagerForward(model)
    return ModelRunner(prepared, forward, served, store, adapter_cache, FileWatch(folder, stamps))


def load_with_kernels(
    folder: Path, settings: WorkerSettings, device: torch.device
) -> tuple[Any, KernelState | None]:
    """Loads the model and the C++ kernels in parallel, because building the kernels takes as long as loading.

    The kernels are None if they can't be used.
    """
    with ThreadPoolExecutor(1, "kernels") as executor:
        can_call = executor.submit(_make_kernels, device, settings.compile)
        model = loading.load_model(folder, settings, device)
    return model, native.new_state() if can_call.result() else None


def _make_kernels(device: torch.device, compile_setting: str) -> bool:
    """Loads the kernels, unless `LORELAY_COMPILE` is off; returns False if they can't be used."""
    if compile_setting == "off":
        return False
    with contextlib.suppress(OSError):  # there is no cache folder; `make_callable` logs this error
        build_cache.drop_truncated(build_cache.cache_folder())
    return native.make_callable(device)


def _compile(folder: Path, prepared: PreparedModel, settings: WorkerSettings) -> Forward:
    job = describe_job(
        folder, prepared.model, prepared.fused_linears, trust_remote_code=settings.trust_remote_code
    )
    return CompiledForward(EagerForward(prepared.model), GraphBuilder(prepared.model, job))


def _build_adapter_cache(
    store: AdapterStore, settings: WorkerSettings, device: torch.device
) -> AdapterCache[SlotWeights]:
    return AdapterCache(
        store,
        ThreadPoolExecutor(1, "adapters"),
        num_slots=settings.max_resident_adapters or settings.max_batch_size,
        max_num_slot_bytes=None if settings.max_resident_adapters else memory.adapter_bytes(device),
        max_num_bytes=settings.max_cached_adapter_bytes or memory.adapter_bytes(torch.device("cpu")),
    )


def _load_adapters(
    store: AdapterStore,
    adapter_cache: AdapterCache[SlotWeights],
    served: ServedModels,
    sources: Sequence[AdapterSource],
) -> None:
    """Reads and checks all adapters; keeps those that fit in host memory and slots."""
    try:
        for source in sources:
            model, weights = store.read_new(source.name, source.path)
            adapter_cache.keep(source.name, weights)
            served.add(model)
        adapter_cache.fill_slots()
    except AdapterError as error:
        raise ConfigurationError(f"LORELAY_ADAPTERS: {error.message}") from error
    if sources:
        logger.info("adapters: %s", adapter_cache.summary, extra=fields("load_adapters"))
