"""`rq worker -w bench.watched.WatchedWorker`: a LoraWorker that writes its memory use to a file."""

import gc
from pathlib import Path
from typing import Any

import msgspec
from pydantic_settings import SettingsConfigDict

from shared.settings import Settings, WorkerSettings
from worker.lora_worker import LoraWorker


class WatchSettings(Settings):
    """Settings of a watched worker."""

    model_config = SettingsConfigDict(env_prefix="LORELAY_BENCH_", frozen=True)

    watch_file: str
    """File to which the worker writes its `Watch` as JSON, once it has drained."""


class Holdings(msgspec.Struct, frozen=True):
    """Memory that a worker uses, after a garbage collection."""

    num_tensors: int
    tensor_bytes: int
    num_resident: int
    num_cached_bytes: int
    num_reads: int
    """Number of adapters read from disk so far."""


class Watch(msgspec.Struct, frozen=True):
    """Memory that a worker used before its first request and after its last request."""

    before: Holdings
    after: Holdings


class WatchedWorker(LoraWorker):
    """A LoraWorker that writes a `Watch` to a file once it has drained."""

    def work(self, *args: Any, **kwargs: Any) -> bool:
        has_worked = super().work(*args, **kwargs)
        watch = Watch(self._before, _holdings(self._model_runner))
        Path(WatchSettings.load().watch_file).write_bytes(msgspec.json.encode(watch))
        return has_worked

    def load_model(self, settings: WorkerSettings) -> Any:
        self._model_runner = super().load_model(settings)
        self._before = _holdings(self._model_runner)
        return self._model_runner


def _holdings(model_runner: Any) -> Holdings:
    import torch

    gc.unfreeze()  # objects frozen with `gc.freeze` would not be counted
    gc.collect()
    # `isinstance` would read `__class__` of lazily loaded modules, and thereby load these modules.
    tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    adapters = model_runner.adapter_cache
    return Holdings(
        num_tensors=len(tensors),
        tensor_bytes=sum(tensor.nbytes for tensor in tensors),
        num_resident=len(adapters.resident),
        num_cached_bytes=adapters.num_cached_bytes,
        num_reads=adapters.num_reads,
    )
