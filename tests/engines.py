"""A double of the `Engine` port, which answers requests without computing anything."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from shared.errors import (
    GenerationFailed,
    GenerationStopped,
    GenerationTimeout,
    LorelayError,
)
from shared.messages import FinishReason, ForwardState, GenerationRequest, StreamEvent, Usage
from tests.fakes import AllResident, served_models
from worker.engine.records import Output, Prompts
from worker.engine.served_models import ServedModels


@dataclass
class Running:
    """A running request; each of its sequences gets a token per step until it has `max_tokens`."""

    request: GenerationRequest
    prompts: list[list[int]]
    num_tokens: list[int]
    """Number of tokens so far, by index of the sequence."""
    next_event_no: int = 0

    def event(self, **values: object) -> StreamEvent:
        self.next_event_no += 1
        return StreamEvent(event_no=self.next_event_no - 1, **values)

    def fail(self, error: LorelayError) -> Output:
        event = self.event(finish_reason=FinishReason.ERROR, error=error.to_info())
        return Output(self.request.request_id, event, {})

    @property
    def usage(self) -> Usage:
        return Usage(sum(map(len, self.prompts)), sum(self.num_tokens))

    def step(self) -> list[Output]:
        outputs = []
        limit = self.request.sampling.max_tokens
        for index, num_tokens in enumerate(self.num_tokens):
            if num_tokens == limit:
                continue
            self.num_tokens[index] += 1
            ends = self.num_tokens[index] == limit
            event = self.event(
                index=index,
                token_ids=(120,),
                text="x",
                finish_reason=FinishReason.LENGTH if ends else None,
                usage=self.usage if min(self.num_tokens) == limit else None,
            )
            outputs.append(Output(self.request.request_id, event, {} if event.is_terminal else None))
        return outputs


@dataclass
class InMemoryEngine:
    """Answers every request with as many x as it asks for. A test decides on what it can't decide itself."""

    before_step: Callable[[], None] = lambda: None
    """Called at the beginning of each step; may raise."""
    overdue: set[str] = field(default_factory=set)
    """Requests over their generation limit."""
    unreadable: dict[str, LorelayError] = field(default_factory=dict)
    """Adapters that are being read, and the errors that `settle_adapters` will find."""
    adapters: AllResident = field(default_factory=AllResident)
    max_model_len: int = 64
    dtype: str = "float32"
    max_num_sequences: int = 8
    served: ServedModels = field(default_factory=lambda: served_models("abc"))
    forward_state: str = ForwardState.EAGER
    is_stalled: bool = False
    is_closed: bool = False
    wake: Callable[[], None] = lambda: None
    _requests: dict[str, Running] = field(default_factory=dict)
    _lone: str | None = None
    _may_run_lone: bool = False
    _ran: list[str] = field(default_factory=list)

    def encode(self, request: GenerationRequest) -> list[list[int]]:
        return [[1, 2, 3] for _ in range(request.num_prompts)]

    @property
    def has_work(self) -> bool:
        return any(not self._waits(running) for running in self._requests.values())

    @property
    def remains(self) -> str:
        return f"{len(self._requests)} requests"

    def call_when_ready(self, wake: Callable[[], None]) -> None:
        self.wake = wake

    def step(self) -> list[Output]:
        lone = None if self._lone not in self._requests else self._lone
        may_run = [lone] if lone else list(self._requests)
        if lone and not self._may_run_lone:
            may_run = []
        self._ran = [name for name in may_run if not self._waits(self._requests[name])]
        self.is_stalled = not self._ran
        if self._ran:
            self.before_step()
        outputs = [output for name in self._ran for output in self._requests[name].step()]
        for output in outputs:
            if output.event.is_terminal:
                del self._requests[output.request_id]
        return outputs

    def add_request(
        self,
        request: GenerationRequest,
        prompts: Prompts,
        events: Iterable[StreamEvent] = (),
        *,
        alone: bool = False,
    ) -> list[Output]:
        events = list(events)
        running = Running(request, [], [0] * request.num_sequences, len(events))
        self.drop_request(request.request_id)
        if isinstance(prompts, LorelayError):
            return [running.fail(prompts)]
        running.prompts = prompts
        for event in events:
            running.num_tokens[event.index] += len(event.token_ids)
        self._requests[request.request_id] = running
        if alone:
            self._lone, self._may_run_lone = request.request_id, False
        return []

    def run_isolated(self) -> None:
        self._may_run_lone = True

    def end_isolation(self) -> None:
        self._lone = None

    def holds(self, request_id: str) -> bool:
        return request_id in self._requests

    def abort_request(self, request_id: str) -> list[Output]:
        running = self._requests.pop(request_id, None)
        if running is None:
            return []
        event = running.event(finish_reason=FinishReason.ABORT, usage=running.usage)
        return [Output(request_id, event, {})]

    def stop_request(self, request_id: str) -> list[Output]:
        return self._fail([request_id], GenerationStopped())

    def drop_request(self, request_id: str) -> None:
        self._requests.pop(request_id, None)

    def shed(self) -> tuple[str | None, list[Output]]:
        newest = next(name for name in reversed(self._requests) if name in self._ran)
        self.max_num_sequences -= 1
        if len(self._ran) == 1:
            is_wide = self._requests[newest].request.num_sequences > 1
            return None, [] if is_wide else self._fail([newest], GenerationFailed())
        del self._requests[newest]
        return newest, []

    def expire_requests(self) -> list[Output]:
        return self._fail([name for name in self._requests if name in self.overdue], GenerationTimeout())

    def settle_adapters(self) -> list[Output]:
        errors, self.unreadable = self.unreadable, {}
        return [
            output
            for adapter_name, error in errors.items()
            for output in self._fail(
                [n for n, r in self._requests.items() if r.request.adapter_name == adapter_name], error
            )
        ]

    def close(self) -> None:
        self.is_closed = True

    def _waits(self, running: Running) -> bool:
        """True while the adapter of a request is being read."""
        return running.request.adapter_name in self.unreadable

    def _fail(self, request_ids: list[str], error: LorelayError) -> list[Output]:
        here = [self._requests.pop(name, None) for name in request_ids]
        return [running.fail(error) for running in here if running is not None]
