"""The ports of the engine: what it needs of a model, and what the serving threads need of an engine.

A second engine is a folder beside `worker.model` with a class that has the methods of `Engine`;
`LoraWorker.load_engine` chooses it, and no other code changes. A second model has the methods of `Model`.
"""

from collections.abc import Callable, Collection, Iterable
from collections.abc import Sequence as Items
from typing import Protocol

from shared.errors import AdapterError
from shared.messages import GenerationRequest, StreamEvent
from worker.engine.records import Output, Prompts
from worker.engine.sequence import Batch, Sampled
from worker.engine.served_models import ServedModels


class Residency(Protocol):
    """The adapter slots of the device. Safe to read in any thread."""

    @property
    def num_slots(self) -> int:
        """The number of adapters that the device holds at once."""
        ...

    @property
    def resident(self) -> tuple[str, ...]:
        """Names of the adapters on the device now, least recently used first."""
        ...


class Adapters(Residency, Protocol):
    """Brings adapters to the device; see `AdapterCache`."""

    on_read: Callable[[], None]
    """Called in any thread when `settle` has an adapter to take in."""

    def bring(self, name: str | None, in_use: Collection[str | None]) -> bool:
        """True if an adapter is resident; if not, begins to bring it. Adapters `in_use` are not evicted."""
        ...

    def is_loading(self, name: str | None) -> bool:
        """True while an adapter is being read from disk."""
        ...

    def settle(self) -> dict[str, AdapterError]:
        """Takes in the adapters that were read; returns those that can't be served, and why."""
        ...


class Model(Protocol):
    """A loaded base model with its adapters and its KV cache. Not thread-safe, except as noted."""

    @property
    def max_model_len(self) -> int:
        """The longest sequence, in tokens."""
        ...

    @property
    def vocab_size(self) -> int:
        """The size of the vocabulary; all token ids are below it."""
        ...

    @property
    def num_blocks(self) -> int:
        """Blocks of the KV cache."""
        ...

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        ...

    @property
    def served(self) -> ServedModels:
        """The base and the adapters that can be used now, with their versions and tokenizers."""
        ...

    @property
    def adapter_cache(self) -> Adapters:
        """Which adapters are on the device."""
        ...

    @property
    def forward_state(self) -> str:
        """A `ForwardState`. Safe to read in any thread."""
        ...

    def run(self, batch: Batch) -> Items[Sampled]:
        """Runs one forward pass; returns the token or error of each sequence that `samples`, in batch order.

        Raises:
            OutOfDeviceMemory: the step did not fit into memory; the cache holds nothing of it.
        """
        ...

    def close(self) -> None:
        """Ends what goes on in the background."""
        ...


class Engine(Protocol):
    """Runs requests for many adapters, one step at a time. Not thread-safe, except as noted."""

    @property
    def max_model_len(self) -> int:
        """The longest sequence, in tokens. This property and all up to `encode` are thread-safe."""
        ...

    @property
    def served(self) -> ServedModels:
        """The base and the adapters that can be used now, with their versions and tokenizers."""
        ...

    @property
    def max_num_sequences(self) -> int:
        """The number of sequences that run at once; it falls for a while after a step that did not fit."""
        ...

    @property
    def adapters(self) -> Residency:
        """Which adapters are on the device."""
        ...

    @property
    def forward_state(self) -> str:
        """A `ForwardState`."""
        ...

    def encode(self, request: GenerationRequest) -> list[list[int]]:
        """The token ids of each prompt of a request; takes seconds for long ones.

        Raises:
            InvalidRequest: a prompt can't be tokenized, or the chat template refuses it.
        """
        ...

    @property
    def has_work(self) -> bool:
        """True if a step would run anything."""
        ...

    @property
    def is_stalled(self) -> bool:
        """True if the last step ran nothing: all requests wait for an adapter, or for one that runs alone."""
        ...

    @property
    def remains(self) -> str:
        """The requests and blocks that the engine holds, for a log line; zeros once all requests ended."""
        ...

    def call_when_ready(self, wake: Callable[[], None]) -> None:
        """Calls `wake`, in any thread, whenever a stalled engine can go on."""
        ...

    def step(self) -> list[Output]:
        """Runs one batch and returns the events it brought.

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
        """Takes a request in, with the result of `encode` and the events that its log holds already.

        `alone` isolates it: nothing runs until `run_isolated`, then only this request until `end_isolation`, so
        that a crash is its own. If the request can't run, the list has its terminal error event; otherwise
        it is empty.
        """
        ...

    def run_isolated(self) -> None:
        """Lets the isolated request run: Redis knows by now that a crash would be its own."""
        ...

    def end_isolation(self) -> None:
        """Lets all requests run together again: the isolated one is cleared."""
        ...

    def holds(self, request_id: str) -> bool:
        """True if the engine has this request and it has not ended."""
        ...

    def abort_request(self, request_id: str) -> list[Output]:
        """Ends a request that its client gave up; returns nothing if the engine does not have it."""
        ...

    def stop_request(self, request_id: str) -> list[Output]:
        """Ends a request that an operator stopped, with an error; returns nothing if it is not here."""
        ...

    def drop_request(self, request_id: str) -> None:
        """Forgets a request that another worker owns now, without an event."""
        ...

    def shed(self) -> tuple[str | None, list[Output]]:
        """Makes room after a step that did not fit into memory: drops its newest request, and returns the id.

        If one request ran alone, the id is None: fewer of its sequences run at once from now on. If it ran a
        single one, it ends with an error.
        """
        ...

    def expire_requests(self) -> list[Output]:
        """Ends the requests that are over their generation limit."""
        ...

    def settle_adapters(self) -> list[Output]:
        """Takes in the adapters that were read; ends the requests for those that can't be served."""
        ...

    def close(self) -> None:
        """Ends what goes on in the background."""
        ...
