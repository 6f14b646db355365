"""Adapters on disk and in the device's slots: what moves the tensors for `AdapterCache`."""

import time
from typing import Any

import torch

from shared.errors import AdapterError
from worker.engine.served_models import ServedModel, ServedModels
from worker.model.adapter_files import LoadedAdapter, load_adapter
from worker.model.lora import LoraStack, SlotWeights


class AdapterStore:
    """The adapters that a worker was given, by name."""

    def __init__(self, model: Any, base_name: str, lora: LoraStack, served: ServedModels) -> None:
        """`base_name` is compared with the base that an adapter declares; `served` gets each adapter."""
        self._model = model
        self._base_name = base_name
        self._lora = lora
        self._served = served

    def register(self, name: str, path: str) -> SlotWeights:
        """Reads and checks an adapter; from then on it is known by its name, with the version it has now.

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
            AdapterError: it can't be served any more, or is another one by now.
        """
        served = self._served.find(name)
        path = served.source
        adapter = load_adapter(name, path, self._model)
        if adapter.version != served.version:
            # The registry, and the prefix cache, know it by the version.
            raise AdapterError(
                f"adapter {name!r} at {path}: its files have changed since this worker started; "
                "serve them under another name, or start all workers anew"
            )
        return self._prepare(name, adapter)

    def put(self, name: str, weights: SlotWeights) -> None:
        """Makes an adapter resident: it can be used from the next step on.

        Raises:
            AdapterError: the device's memory has no room for it.
        """
        try:
            self._lora.put(name, weights)
        except torch.OutOfMemoryError as error:
            self._lora.remove(name)
            raise AdapterError(f"adapter {name!r} does not fit into the device's memory: {error}") from error

    def remove(self, name: str) -> None:
        """Frees an adapter's slot."""
        self._lora.remove(name)

    def _prepare(self, name: str, adapter: LoadedAdapter) -> SlotWeights:
        try:
            return self._lora.prepare(name, adapter)
        # A lack of memory; torch's own is a RuntimeError.
        except (MemoryError, RuntimeError) as error:
            raise AdapterError(f"adapter {name!r} at {adapter.path}: {error}") from error
