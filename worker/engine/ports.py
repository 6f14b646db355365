"""The ports (interfaces) of an engine. Serving code calls `Engine`, and an engine calls the other ports.

To add a second engine, write a class with the methods of `Engine` in a new folder beside `worker.model`. This
also needs four changes elsewhere:

* `LoraWorker.load_engine` (`worker/lora_worker.py`) must choose the engine, by a setting in
  `shared/settings.py`.
* `pyproject.toml` must list the engine's package, with the imports that this package may have.
* The engine must compute weights versions with `worker/model/versions.py`, which needs no torch. With other
  versions, the registry would refuse the engine's models, and requests could not move between the engines.
* `tests/unit/worker/engine/test_engine_contract.py` must pass with the engine.

To run `BatchingEngine` on another kind of model, write a class with the methods of `Model`.
"""

from collections.abc import Callable, Collection, Iterable
from collections.abc import Sequence as Items
from typing import Protocol

from shared.errors import AdapterError
from shared.messages import GenerationRequest, StreamEvent
from worker.engine.records import AdapterCounts, Output, Prompts
from worker.engine.sequence import Batch, Sampled
from worker.engine.served_models import ServedModels
from worker.engine.tokenizer_port import Tokenizer


class Residency(Protocol):
    """Tells which adapters are on the device. Safe to read from any thread."""

    @property
    def num_slots(self) -> int:
        """Number of adapters that the device can hold at once."""
        ...

    @property
    def resident(self) -> tuple[str, ...]:
        """Names of the adapters on the device now, least recently used first."""
        ...

    @property
    def counts(self) -> AdapterCounts:
        """The numbers of adapters in slots, in host memory and on disk, and their sizes in bytes."""
        ...


class Adapters(Residency, Protocol):
    """Brings adapters to the device; see `AdapterCache`."""

    on_read: Callable[[], None]
    """Called in any thread after a read from disk; wakes the engine's thread, which calls `settle`."""

    def bring(self, name: str | None, in_use: Collection[str | None]) -> bool:
        """Returns True if an adapter is resident; otherwise begins to load it, without evicting `in_use`."""
        ...

    def is_loading(self, name: str | None) -> bool:
        """True while an adapter is being read from disk."""
        ...

    def settle(self) -> dict[str, AdapterError]:
        """Copies newly read adapters into slots; returns the errors of adapters that failed, by name."""
        ...


class Model(Protocol):
    """A loaded base model with its adapters and its KV cache. Not thread-safe, except as noted."""

    @property
    def max_model_len(self) -> int:
        """Maximum number of tokens of a sequence, prompt and output together."""
        ...

    @property
    def dtype(self) -> str:
        """The number type of the weights, such as `bfloat16`."""
        ...

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary; all token ids are lower than this number."""
        ...

    @property
    def num_blocks(self) -> int:
        """Number of blocks of the KV cache."""
        ...

    @property
    def block_size(self) -> int:
        """Number of tokens in a block."""
        ...

    @property
    def served(self) -> ServedModels:
        """The base and the adapters that can be used now, with their versions and tokenizers."""
        ...

    @property
    def adapter_cache(self) -> Adapters:
        """The cache of adapters, which decides which adapters are on the device."""
        ...

    @property
    def forward_state(self) -> str:
        """The state of the forward pass, a `ForwardState`. Safe to read from any thread."""
        ...

    def run(self, batch: Batch) -> Items[Sampled]:
        """Runs one forward pass; returns the token or error of each sequence that `samples`, in batch order.

        Raises:
            OutOfDeviceMemory: the step did not fit into memory. No token of the step counts as computed.
        """
        ...

    def compile_grammar(self, grammar: str, tokenizer: Tokenizer) -> object:
        """Compiles a grammar ahead of its first use, and keeps it; callable from any thread.

        Raises:
            InvalidRequest: the grammar can't be compiled, or not for this tokenizer.
        """
        ...

    def close(self) -> None:
        """Stops all background work."""
        ...


class Engine(Protocol):
    """Runs requests for many adapters, one step at a time. Not thread-safe, except as noted."""

    @property
    def max_model_len(self) -> int:
        """Maximum number of tokens of a sequence. All members from this one to `encode` are thread-safe."""
        ...

    @property
    def dtype(self) -> str:
        """The number type of the weights, such as `bfloat16`."""
        ...

    @property
    def served(self) -> ServedModels:
        """The base and the adapters that can be used now, with their versions and tokenizers."""
        ...

    @property
    def max_num_sequences(self) -> int:
        """Maximum number of sequences that run at once; lower for a while after a step ran out of memory."""
        ...

    @property
    def adapters(self) -> Residency:
        """The adapters that are resident on the device."""
        ...

    @property
    def forward_state(self) -> str:
        """The state of the forward pass, a `ForwardState`."""
        ...

    def encode(self, request: GenerationRequest) -> list[list[int]]:
        """Returns the token ids of each prompt of a request; a prompt of some MB takes seconds.

        A grammar of the request is also compiled here, before the first step.

        Raises:
            InvalidRequest: a prompt can't be tokenized, the chat template refuses it, or the grammar can't be
                compiled.
            ServerBusy: the chat template can't be run at the moment for this tenant.
        """
        ...

    @property
    def has_work(self) -> bool:
        """False if there is no sequence, or if all sequences wait while their adapters are read from disk.

        Even if `has_work` is true, a step may run nothing; see `is_stalled`.
        """
        ...

    @property
    def is_stalled(self) -> bool:
        """True if the last step ran nothing, because all requests wait (for adapters or `run_isolated`)."""
        ...

    @property
    def remains(self) -> str:
        """Text for a log line: the numbers of requests and cache blocks that are still held."""
        ...

    def call_when_ready(self, wake: Callable[[], None]) -> None:
        """Makes the engine call `wake`, from any thread, whenever it was stalled and can go on."""
        ...

    def step(self) -> list[Output]:
        """Runs one batch and returns its events.

        Raises:
            OutOfDeviceMemory: the step did not fit into memory; call `shed`.
        """
        ...

    def add_request(
        self,
        request: GenerationRequest,
        prompts: Prompts,
        events: Iterable[StreamEvent] = (),
        *,
        alone: bool = False,
    ) -> list[Output]:
        """Adds a request, with the result of `encode` (`prompts`) and the events that are already in its log.

        `alone` isolates the request: no request runs until `run_isolated`, then only this one runs until
        `end_isolation`. Only this request can then have caused a crash in between. If the request can't run,
        the returned list has its terminal error event. Otherwise, the list is empty.
        """
        ...

    def run_isolated(self) -> None:
        """Lets the isolated request run.

        The caller must first record in Redis that this request runs alone.
        """
        ...

    def end_isolation(self) -> None:
        """Lets all requests run together again; call it once the isolated request has proved harmless."""
        ...

    def holds(self, request_id: str) -> bool:
        """True if the engine has this request and it has not ended."""
        ...

    def abort_request(self, request_id: str) -> list[Output]:
        """Ends a request whose client disconnected or canceled it.

        Returns [] if the engine doesn't have the request.
        """
        ...

    def stop_request(self, request_id: str) -> list[Output]:
        """Ends a request that an operator stopped; returns its error event, or [] if it is not here."""
        ...

    def drop_request(self, request_id: str) -> None:
        """Removes, without an event, a request that another worker has claimed."""
        ...

    def shed(self) -> tuple[str | None, list[Output]]:
        """Reduces the load after a step ran out of memory, so that the step can be repeated.

        If the step ran several requests, the newest one is removed, and its id is returned. If the step ran
        one request with several sequences, fewer of them run at once for a while, and the returned id is
        None. If the step ran a single sequence, its request ends with the returned error event, and the id is
        None, too.
        """
        ...

    def expire_requests(self) -> list[Output]:
        """Ends the requests that have run longer than their generation limit."""
        ...

    def settle_adapters(self) -> list[Output]:
        """Copies newly read adapters into slots; ends the requests for adapters that can't be served."""
        ...

    def close(self) -> None:
        """Stops all background work."""
        ...
