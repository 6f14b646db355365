"""The adapters' files on disk, and the device's slots: moves the tensors for `AdapterCache`."""

import time
from typing import Any

import torch

from shared.errors import AdapterError
from worker.engine.served_models import ServedModel, ServedModels
from worker.model.adapter_files import LoadedAdapter, load_adapter
from worker.model.lora import LoraStack, SlotWeights


class AdapterStore:
    """Moves adapters from disk to host memory, and from there into slots."""

    def __init__(self, model: Any, base_name: str, lora: LoraStack, served: ServedModels) -> None:
        """`base_name` is compared with the base that an adapter declares; `served` gets each adapter."""
        self._model = model
        self._base_name = base_name
        self._lora = lora
        self._served = served

    def register(self, name: str, path: str) -> SlotWeights:
        """Reads and checks an adapter, which is served from now on, in the version that was read.

        Raises:
            AdapterError: it can't be served; the message has name, path and reason.
        """
        adapter = load_adapter(name, path, self._model, self._base_name)
        weights = self._prepare(name, adapter)
        tokenizer = self._served.base.tokenizer
        self._served.add(ServedModel(name, adapter.version, path, tokenizer, int(time.time()), name))
        return weights

    def read(self, name: str) -> SlotWeights:
        """Reads a registered adapter again; may be called in any thread.

        Raises:
            AdapterError: it can't be served any more, or its files have changed.
        """
        served = self._served.find(name)
        path = served.source
        adapter = load_adapter(name, path, self._model)
        if adapter.version != served.version:
            # The registry and the prefix cache go by the version: changed weights would answer under the old
            # one.
            raise AdapterError(
                f"adapter {name!r} at {path}: its files have changed since this worker started; "
                "serve them under another name, or start all workers anew"
            )
        return self._prepare(name, adapter)

    def put(self, name: str, weights: SlotWeights, slot: int) -> None:
        """Copies an adapter's weights into a slot, in place of the ones there; the next step can use them.

        Raises:
            AdapterError: the device's memory has no room for it. The slot's contents are undefined then.
        """
        try:
            self._lora.put(slot, weights)
        except torch.OutOfMemoryError as error:
            raise AdapterError(f"adapter {name!r} does not fit into the device's memory: {error}") from error

    def _prepare(self, name: str, adapter: LoadedAdapter) -> SlotWeights:
        try:
            return self._lora.prepare(name, adapter)
        # Too little memory raises either: torch's allocator on the CPU has a plain RuntimeError.
        except (MemoryError, RuntimeError) as error:
            raise AdapterError(f"adapter {name!r} at {adapter.path}: {error}") from error
