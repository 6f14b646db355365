"""Prepares a loaded transformers model: checks it, makes its Linears faster, and allocates its KV cache.

Linears are fused, packed for oneDNN, and computed by C++ kernels, each where possible.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shared.errors import AdapterError
from shared.logs import fields
from shared.settings import WorkerSettings
from worker.model import loading, memory
from worker.model.attention import AttentionState, attach
from worker.model.batch_forward import BatchForward
from worker.model.forward import EagerForward
from worker.model.kernels.native import KernelState
from worker.model.kernels.products import FusedLinears, fuse
from worker.model.kv_cache import PagedKVCache
from worker.model.lora import LoraStack
from worker.model.self_check import SelfCheck, num_blocks_needed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedModel:
    """A model that passed the self-check, with its KV cache and its adapter slots."""

    model: Any
    fused_linears: Sequence[FusedLinears]
    state: AttentionState
    lora: LoraStack
    max_model_len: int

    @property
    def device(self) -> torch.device:
        """The device of the model's weights."""
        device: torch.device = self.model.device
        return device


def prepare(model: Any, settings: WorkerSettings, kernels: KernelState | None) -> PreparedModel:
    """Prepares a model from `loading.load_model`; `kernels`, if given, compute Linears and attention.

    Raises:
        ConfigurationError: the model can't be served, or its KV cache doesn't fit into memory.
    """
    state = AttentionState(PagedKVCache(num_blocks_needed(settings.block_size), settings.block_size))
    attach(model, state)
    check = SelfCheck(model, state, settings.block_size, settings.model)
    fused_linears = check.run(
        _without_adapters(model, state, LoraStack(model, [], model.dtype))
    ).fusable_linears(model)
    lora = LoraStack(model, fused_linears, model.dtype, kernels)
    if kernels is not None:
        state.use(kernels)
    _fuse_all(model, fused_linears, kernels)
    check.run_again(_without_adapters(model, state, lora))
    max_model_len = loading.max_model_len(model.config, settings.session_len)
    num_blocks = memory.num_cache_blocks(
        settings,
        model.device,
        max_model_len=max_model_len,
        num_block_bytes=state.kv_cache.num_bytes_per_block,
    )
    state.kv_cache.resize(num_blocks)
    _log_cache(state.kv_cache, max_model_len)
    return PreparedModel(model, fused_linears, state, lora, max_model_len)


def _without_adapters(model: Any, state: AttentionState, lora: LoraStack) -> BatchForward:
    def refuse(name: str) -> int:
        raise AdapterError(f"adapter {name!r} is not loaded")

    return BatchForward(EagerForward(model), state, lora, model.device, refuse)


def _fuse_all(model: Any, fused_linears: Sequence[FusedLinears], kernels: KernelState | None) -> None:
    num_packed = 0
    for fused in fused_linears:
        linears = [model.get_submodule(name) for name in fused.names]
        num_packed += fuse(linears, fused, kernels)
    logger.info(
        "forward pass: %s, %s; %d Linears in %d matmuls",
        model.dtype,
        "packed for oneDNN" if num_packed else "plain weights",
        sum(len(fused.names) for fused in fused_linears),
        len(fused_linears),
        extra=fields("load_model"),
    )


def _log_cache(cache: PagedKVCache, max_model_len: int) -> None:
    num_tokens = cache.num_blocks * cache.block_size
    logger.info(
        "KV cache: %d tokens in %d MiB; room for %.1f sequences of %d tokens",
        num_tokens,
        cache.num_blocks * cache.num_bytes_per_block >> 20,
        num_tokens / max_model_len,
        max_model_len,
        extra=fields("allocate_cache"),
    )
