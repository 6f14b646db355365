"""The models that a worker serves: the one owner of their names, versions, sources and tokenizers."""

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from shared.errors import AdapterError, AdapterVersionGone
from shared.messages import GenerationRequest, weights_version


class Detokenizer(Protocol):
    """Turns the tokens of one sequence into text, one at a time; see `worker.engine.detokenizer`."""

    def add(self, token_id: int) -> str: ...


class Tokenizer(Protocol):
    """Prompts to tokens and back, in any thread; see `worker.model.tokenizer`."""

    @property
    def eos_token_ids(self) -> frozenset[int]: ...

    def encode_chat(self, messages: list[dict[str, Any]]) -> list[int]: ...

    def encode_text(self, text: str) -> list[int]: ...

    def detokenizer(self) -> Detokenizer: ...


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The base model, or an adapter on top of it."""

    name: str
    """The name that clients use."""
    version: str
    """SHA-256 (hex) of its files: the adapter's own, not the base's."""
    source: str
    """Folder or Hugging Face id, as configured."""
    tokenizer: Tokenizer
    """Tokenizer and chat template that belong to this version."""
    created: int
    """Unix seconds at which this worker began to serve it."""
    adapter_name: str | None = None
    """None for the base model."""


class ServedModels:
    """The base model and the adapters that this worker serves now.

    `add` and `remove` are safe while requests run, though nothing calls them after the start yet. Any thread
    may read: a reader sees the models before a change or after it.
    """

    def __init__(self, base: ServedModel) -> None:
        self.base = base
        self._adapters: Mapping[str, ServedModel] = {}
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[ServedModel]:
        """The base, then its adapters in the order in which they were added."""
        return iter((self.base, *self._adapters.values()))

    @property
    def adapters(self) -> Mapping[str, ServedModel]:
        """The adapters by name, as they are now; the mapping itself never changes."""
        return self._adapters

    def add(self, adapter: ServedModel) -> None:
        """Adds an adapter, in place of an earlier one of its name."""
        with self._lock:
            self._adapters = {**self._adapters, adapter.name: adapter}

    def remove(self, name: str) -> None:
        """Removes an adapter; a name that is not served is no error."""
        with self._lock:
            self._adapters = {other: model for other, model in self._adapters.items() if other != name}

    def find(self, adapter_name: str | None) -> ServedModel:
        """The model of this adapter name; the base for None.

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
        """The model that answers a request, in the version that its client was promised.

        Raises:
            AdapterError: this worker does not serve the adapter.
            AdapterVersionGone: this worker serves other weights under the same name. Claims pass over such
                requests, so the weights changed since the claim.
        """
        model = self.find(request.adapter_name)
        adapter_version = model.version if model.adapter_name else None
        promised = request.base_version, request.adapter_version
        # An API of an earlier release sends no version of the base, and accepts any.
        if any(
            version not in (None, own)
            for version, own in zip(promised, (self.base.version, adapter_version), strict=True)
        ):
            raise AdapterVersionGone
        return model

    def weights_version(self, model: ServedModel) -> str:
        """The version of all weights that answer a request for a model: the base's and the adapter's."""
        return weights_version(self.base.version, model.version if model.adapter_name else None)
