"""The ports of the engine: what it needs of a model, and what the serving threads need of an engine.

A second model stands beside `worker.model`, a second engine beside `BatchingEngine`; nothing else changes.
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
    """Where the adapters that run find room. Safe to read in any thread."""

    @property
    def num_slots(self) -> int:
        """How many adapters find room on the device at once."""
        ...

    @property
    def resident(self) -> tuple[str, ...]:
        """Names of those on the device now, least recently used first."""
        ...


class Adapters(Residency, Protocol):
    """Brings adapters to the device; see `AdapterCache`."""

    on_read: Callable[[], None]
    """Called in any thread when `settle` has an adapter to take in."""

    def bring(self, name: str | None, in_use: Collection[str | None]) -> bool:
        """Whether an adapter is resident now; starts to bring it if not. `in_use` must not leave."""
        ...

    def is_loading(self, name: str | None) -> bool:
        """Whether an adapter is being read from disk."""
        ...

    def settle(self) -> dict[str, AdapterError]:
        """Takes in the adapters that were read; returns those that can't be served, and why."""
        ...


class Model(Protocol):
    """A loaded base model with its adapters and its KV cache. One thread calls it, but where it says so."""

    @property
    def max_model_len(self) -> int:
        """The longest sequence, in tokens."""
        ...

    @property
    def vocab_size(self) -> int:
        """All token ids are below it."""
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
        """One forward pass: what it drew for each sequence that `samples`, in batch order.

        Raises:
            OutOfDeviceMemory: the step did not fit; the cache holds nothing of it.
        """
        ...

    def close(self) -> None:
        """Ends what goes on in the background."""
        ...


class Engine(Protocol):
    """Runs requests of many adapters, a step at a time. One thread calls it, but where it says so."""

    @property
    def max_model_len(self) -> int:
        """The longest sequence, in tokens. Safe to read in any thread, as all up to `encode`."""
        ...

    @property
    def served(self) -> ServedModels:
        """The base and the adapters that can be used now, with their versions and tokenizers."""
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
        """Whether a step would run anything."""
        ...

    @property
    def is_stalled(self) -> bool:
        """Whether the last step ran nothing: all that could run waits for an adapter, or to run alone."""
        ...

    @property
    def remains(self) -> str:
        """What it holds, for a log line: nothing but zeros when all requests have ended."""
        ...

    def call_when_ready(self, wake: Callable[[], None]) -> None:
        """Calls `wake`, in any thread, whenever what an engine that is stalled waits for has come."""
        ...

    def step(self) -> list[Output]:
        """Runs one batch and returns the events it brought.

        Raises:
            OutOfDeviceMemory: the step did not fit; call `shed`.
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
        """Takes a request in: `prompts` is what `encode` gave, `events` what its log holds already.

        `alone`: nothing runs until `run_alone`, then this request without the others until `allow_company`,
        so that a crash is its own.
        A request that can't run ends here: the list then holds its terminal error event, else it is empty.
        """
        ...

    def run_alone(self) -> None:
        """Lets the request run that was added to run alone: a crash from now on is known to be its own."""
        ...

    def allow_company(self) -> None:
        """Lets all requests run together again: the one that ran alone is beyond doubt."""
        ...

    def holds(self, request_id: str) -> bool:
        """Whether this request is here and has not ended."""
        ...

    def abort_request(self, request_id: str) -> list[Output]:
        """Ends a request that its client gave up; nothing if it is not here."""
        ...

    def stop_request(self, request_id: str) -> list[Output]:
        """Ends a request that an operator stopped, with an error; nothing if it is not here."""
        ...

    def drop_request(self, request_id: str) -> None:
        """Forgets a request that another worker owns now: no event."""
        ...

    def shed(self) -> tuple[str | None, list[Output]]:
        """Makes room after a step that did not fit into memory: the id of its newest request, now dropped.

        A request that did not fit even alone ends with an error instead, and the id is None.
        """
        ...

    def expire_requests(self) -> list[Output]:
        """Ends the requests that are over their generation limit."""
        ...

    def settle_adapters(self) -> list[Output]:
        """Takes in the adapters that were read since; ends the requests of those that can't be served."""
        ...

    def close(self) -> None:
        """Ends what goes on in the background."""
        ...
