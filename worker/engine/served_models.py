"""The models that a worker serves.

Only this module stores the names, versions, sources and tokenizers of these models.
"""

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shared.errors import AdapterError, AdapterVersionGone
from shared.messages import GenerationRequest, weights_version

if TYPE_CHECKING:  # `ports` imports this module
    from worker.engine.tokenizer_port import Tokenizer


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The base model, or one of its adapters."""

    name: str
    """The name that clients send in `model`."""
    version: str
    """SHA-256 (hex) of the model's weights and config; an adapter's version does not cover its base model."""
    source: str
    """Folder or Hugging Face id from the configuration."""
    tokenizer: "Tokenizer"
    """Tokenizer and chat template of this version."""
    created: int
    """Unix seconds at which this worker began to serve the model."""
    adapter_name: str | None = None
    """Name of the adapter, or None for the base model."""


class ServedModels:
    """The base model and the adapters that this worker serves now.

    `add` and `remove` are safe while requests run, but today they are called only when a worker starts. Any
    thread may read. A reader sees the models either before or after a change.
    """

    def __init__(self, base: ServedModel) -> None:
        self.base = base
        self._adapters: Mapping[str, ServedModel] = {}
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[ServedModel]:
        """Iterates over the base model, then over its adapters in the order in which they were added."""
        return iter((self.base, *self._adapters.values()))

    @property
    def adapters(self) -> Mapping[str, ServedModel]:
        """The current adapters by name: a snapshot, which does not change when adapters are added later."""
        return self._adapters

    def add(self, adapter: ServedModel) -> None:
        """Adds an adapter, which replaces an earlier adapter of this name."""
        with self._lock:
            self._adapters = {**self._adapters, adapter.name: adapter}

    def remove(self, name: str) -> None:
        """Removes an adapter; does nothing if no adapter has this name."""
        with self._lock:
            self._adapters = {other: model for other, model in self._adapters.items() if other != name}

    def find(self, adapter_name: str | None) -> ServedModel:
        """Returns the adapter of this name, or the base model for None.

        Raises:
            AdapterError: this worker does not serve the adapter.
        """
        if adapter_name is None:
            return self.base
        model = self._adapters.get(adapter_name)
        if model is None:
            raise AdapterError(f"adapter {adapter_name!r} is not loaded on this worker")
        return model

    def model_of(self, request: GenerationRequest) -> ServedModel:
        """Returns the model that answers a request; checks that it has the version that the request names.

        Raises:
            AdapterError: this worker does not serve the adapter.
            AdapterVersionGone: this worker serves other weights under the requested name. This can happen
                only if the weights were replaced after the claim.
        """
        model = self.find(request.adapter_name)
        adapter_version = model.version if model.adapter_name else None
        requested = request.base_version, request.adapter_version
        # An API process of an earlier release sends no base version (None): then any version is right.
        if any(
            version not in (None, own)
            for version, own in zip(requested, (self.base.version, adapter_version), strict=True)
        ):
            raise AdapterVersionGone
        return model

    def weights_version(self, model: ServedModel) -> str:
        """Returns a model's weights version; an adapter's includes the base's version."""
        return weights_version(self.base.version, model.version if model.adapter_name else None)
