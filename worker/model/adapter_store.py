"""Reads adapter files and copies their tensors into slots on the device, when `AdapterCache` asks for it.

Adapters are added only when a worker starts, by `worker.model.startup`. To add an adapter while requests run,
these steps would be needed:

* Step 1: a separate thread calls `AdapterStore.read_new`, which reads the disk.
* Step 2: the same thread calls `shared.queue.registry.register` with the adapter's card. If the call raises
  `RegistryConflict`, the adapter can't be added.
* Step 3: the engine's thread calls `AdapterCache.keep`, then `ServedModels.add`. Before step 3, the adapter's
  requests wait.
* Step 4: `LoraWorker` adds the worker to RQ's set of the queue's workers. Without this step, the API reports
  `no_worker`.

Workers claim from the new queue after the next heartbeat, which writes `ServedModels` to Redis. The ports
`Model` and `Adapters` (`worker.engine.ports`) have no methods for the steps 1 and 3 yet. A sender and
persistence are missing, too:

* The sender would publish a command on each worker's channel `rq:pubsub:<worker>`, and
  `LoraWorker.handle_payload` would receive it. If API processes send this command, their Redis user needs the
  permission to publish on the channel (`API` in `shared.queue.permissions`).
* Without persistence, a worker that starts later would not serve the adapter, because it reads only
  `settings.adapters`.
"""

import contextlib
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from shared.errors import AdapterError
from worker.engine.served_models import ServedModel, ServedModels
from worker.model.adapter_files import LoadedAdapter, load_adapter
from worker.model.adapter_tokenizer import TokenizerProblem, files_digest, load_tokenizer, own_files
from worker.model.limited_process import LimitedProcess
from worker.model.lora import LoraStack, SlotWeights
from worker.model.tokenizer import Tokenizer
from worker.model.versions import own_version


class NewAdapter(NamedTuple):
    """An adapter that was read, in the parts that `ServedModels.add` and `AdapterCache.keep` need."""

    model: ServedModel
    weights: SlotWeights


class AdapterStore:
    """Reads adapters from disk into host memory, and copies them from host memory into slots."""

    def __init__(self, model: Any, base_name: str, lora: LoraStack, served: ServedModels) -> None:
        """`served`: has the adapters' paths and versions.

        `base_name`: the base that the adapters' configs should name.
        """
        self._model = model
        self._base_name = base_name
        self._lora = lora
        self._served = served
        self._tokenizers: dict[str, Tokenizer] = {}
        """Tokenizers that adapters bring along, by the digest of their files: many adapters share one."""
        self._limited = LimitedProcess()
        self._lock = threading.Lock()
        self._folders: dict[tuple[str, str], Path] = {}
        """The folder of each path and version: a branch of a repository may have moved on since."""

    def read_new(self, name: str, path: str) -> NewAdapter:
        """Reads and checks an adapter that is not served yet; changes nothing. Callable from any thread.

        Raises:
            AdapterError: the adapter can't be served; the message has name, path and reason.
        """
        adapter = load_adapter(name, path, self._model, self._base_name, patterns=self._limited)
        weights = self._prepare(name, adapter)
        tokenizer, version = self._tokenizer(name, adapter)
        self._folders[path, version] = adapter.folder
        return NewAdapter(ServedModel(name, version, path, tokenizer, int(time.time()), name), weights)

    def read(self, name: str) -> SlotWeights:
        """Reads a served adapter again; may be called from any thread.

        Raises:
            AdapterError: the adapter can't be served any more, or its files have changed.
        """
        served = self._served.find(name)
        path = served.source
        adapter = load_adapter(
            name,
            path,
            self._model,
            folder=self._folders.get((path, served.version)),
            patterns=self._limited,
        )
        has_own_tokenizer = served.tokenizer is not self._served.base.tokenizer
        version = self._tokenizer(name, adapter)[1] if has_own_tokenizer else adapter.version
        if version != served.version:
            # Changed weights are refused: clients and prefix cache would take them for the old version.
            raise AdapterError(
                f"adapter {name!r} at {path}: its files have changed since this worker started; "
                "serve them under another name, or restart all workers"
            )
        return self._prepare(name, adapter)

    def put(self, name: str, weights: SlotWeights, slot: int) -> None:
        """Replaces the contents of a slot by an adapter's weights, which the next step can use.

        Raises:
            AdapterError: the weights don't fit into device memory; the slot's contents are then undefined.
        """
        try:
            self._lora.put(slot, weights)
        except torch.OutOfMemoryError as error:
            raise AdapterError(f"adapter {name!r} does not fit into the device's memory: {error}") from error

    def clear(self, slot: int) -> None:
        """Removes an adapter's weights from a slot, to free their memory."""
        # The removal copies the other slots' weights. If memory is too short for the copy, the weights stay.
        with contextlib.suppress(torch.OutOfMemoryError):
            self._lora.put(slot, SlotWeights({}))

    def _tokenizer(self, name: str, adapter: LoadedAdapter) -> tuple[Tokenizer, str]:
        """Returns an adapter's tokenizer and version; the version covers a tokenizer of the adapter's own.

        Raises:
            AdapterError: the model can't use the adapter's tokenizer, template or end tokens.
        """
        base = cast(Tokenizer, self._served.base.tokenizer)
        try:
            files = own_files(adapter.folder)
            if not files:
                return base, adapter.version
            digest = files_digest(files)
            with self._lock:
                if digest not in self._tokenizers:
                    num_embeddings = self._model.get_input_embeddings().num_embeddings
                    self._tokenizers[digest] = load_tokenizer(files, base, num_embeddings, self._limited)
                tokenizer = self._tokenizers[digest]
        except TokenizerProblem as problem:
            raise AdapterError(f"adapter {name!r} at {adapter.path}: {problem}") from problem
        return tokenizer, adapter.version if tokenizer is base else own_version(adapter.version, digest)

    def _prepare(self, name: str, adapter: LoadedAdapter) -> SlotWeights:
        try:
            return self._lora.prepare(name, adapter)
        # When host memory is short, torch's CPU allocator raises RuntimeError, other code MemoryError.
        except (MemoryError, RuntimeError) as error:
            raise AdapterError(f"adapter {name!r} at {adapter.path}: {error}") from error
