"""The engine takes requests and returns their events, step by step. Read `BatchingEngine.step` first."""

import logging
import time
from collections.abc import Callable, Iterable

from shared.errors import GenerationFailed, GenerationStopped, GenerationTimeout, LorelayError
from shared.logs import fields
from shared.messages import GenerationRequest, StreamEvent
from worker.engine.intake import Intake
from worker.engine.ports import Model, Residency
from worker.engine.records import Output, Prompts
from worker.engine.request_output import Clock, RequestOutput
from worker.engine.scheduler import Scheduler
from worker.engine.sequence import Batch
from worker.engine.served_models import ServedModels

logger = logging.getLogger(__name__)


class BatchingEngine:
    """The `Engine` of Lorelay: runs requests for different adapters in one batch, without network I/O."""

    def __init__(self, model: Model, scheduler: Scheduler, clock: Clock = time.monotonic) -> None:
        """Starts without requests; `clock` returns seconds."""
        self._model = model
        self._scheduler = scheduler
        self._intake = Intake(model, clock)
        self._outputs: dict[str, RequestOutput] = {}
        self._not_run: list[RequestOutput] = []
        """Requests of which no sequence has run yet; the next step removes those that have ended."""
        self._batch: Batch = []
        self.is_stalled = False

    def step(self) -> list[Output]:
        """Runs one batch and returns its events, at most one per sequence."""
        self._batch = batch = self._scheduler.schedule()
        if self._not_run:
            self._not_run = [output for output in self._not_run if not output.note_run()]
        self.is_stalled = not batch
        if self.is_stalled:
            return []
        outputs: list[Output] = []
        for seq, token in self._scheduler.postprocess(batch, self._model.run(batch)):
            # The request has ended already if another of its sequences had an error in this batch.
            if request := self._outputs.get(seq.request_id):
                outputs.append(emitted := request.add(seq.index, token))
                if emitted.event.is_terminal:
                    self._remove(seq.request_id)
                elif seq.finish_reason:
                    self._scheduler.finish(seq)
        return outputs

    @property
    def has_work(self) -> bool:
        """False if there is no sequence, or if all sequences wait for adapters to be read; see `Engine`."""
        return self._scheduler.has_work

    @property
    def remains(self) -> str:
        """Text for a log line: the numbers of requests and cache blocks that the engine holds."""
        return f"{len(self._outputs)} requests, {self._scheduler.num_blocks_in_use} cache blocks in use"

    @property
    def max_num_sequences(self) -> int:
        """Maximum number of sequences that run at once; see `Engine`."""
        return self._scheduler.max_num_sequences

    @property
    def max_model_len(self) -> int:
        """Maximum number of tokens of a sequence, prompt and output together."""
        return self._model.max_model_len

    @property
    def dtype(self) -> str:
        """The number type of the weights."""
        return self._model.dtype

    @property
    def served(self) -> ServedModels:
        """The base model and the adapters that requests can use now."""
        return self._model.served

    @property
    def adapters(self) -> Residency:
        """The adapters that are resident on the device."""
        return self._model.adapter_cache

    @property
    def forward_state(self) -> str:
        """The state of the forward pass, a `ForwardState`."""
        return self._model.forward_state

    def call_when_ready(self, wake: Callable[[], None]) -> None:
        """Makes the engine call `wake`, from another thread, each time an adapter has been read from disk."""
        self._model.adapter_cache.on_read = wake

    def encode(self, request: GenerationRequest) -> list[list[int]]:
        """Returns the token ids of each prompt of a request. May be called from any thread."""
        return self._intake.encode(request)

    def add_request(
        self,
        request: GenerationRequest,
        prompts: Prompts,
        events: Iterable[StreamEvent] = (),
        *,
        alone: bool = False,
    ) -> list[Output]:
        """Adds a request, or returns the error with which the request ends at once; see `Engine`."""
        self.drop_request(request.request_id)
        events = tuple(events)
        try:
            output = self._intake.prepare(request, prompts, events)
        except LorelayError as error:
            return [_refusal(request.request_id, error, len(events))]
        # No other request is handled here, so this one must have caused the error.
        except Exception:
            logger.exception("request %s can't be prepared", request.request_id, extra=fields("add_request"))
            return [_refusal(request.request_id, GenerationFailed(), len(events))]
        self._outputs[request.request_id] = output
        self._not_run.append(output)
        for seq in output.sequences:
            self._scheduler.add(seq)
        if alone:
            self._scheduler.isolate(request.request_id)
        return []

    def run_isolated(self) -> None:
        """Lets the isolated request run, and no other."""
        self._scheduler.run_isolated()

    def end_isolation(self) -> None:
        """Lets all requests run together again."""
        self._scheduler.isolate(None)

    def holds(self, request_id: str) -> bool:
        """True if the engine has this request and it has not ended."""
        return request_id in self._outputs

    def abort_request(self, request_id: str) -> list[Output]:
        """Ends a request whose client disconnected or canceled; see `Engine`."""
        output = self._remove(request_id)
        return [output.abort()] if output else []

    def stop_request(self, request_id: str) -> list[Output]:
        """Ends a request that an operator stopped with an error event; see `Engine`."""
        output = self._remove(request_id)
        return [output.fail(GenerationStopped())] if output else []

    def drop_request(self, request_id: str) -> None:
        """Removes, without an event, a request that another worker has claimed."""
        self._remove(request_id)

    def shed(self) -> tuple[str | None, list[Output]]:
        """Reduces the load after a step ran out of memory; see `Engine`."""
        self._scheduler.shrink()
        ran = {scheduled.seq.request_id for scheduled in self._batch}
        newest = next(request_id for request_id in reversed(self._outputs) if request_id in ran)
        if len(ran) > 1:
            self._remove(newest)
            return newest, []
        # The sequences of one request can run one after another.
        if len(self._batch) > 1:
            return None, []
        output = self._outputs[newest]
        self._remove(newest)
        return None, [output.fail(GenerationFailed("The request does not fit into the device's memory."))]

    def expire_requests(self) -> list[Output]:
        """Ends the requests that have run longer than their generation limit."""
        expired = [output for output in self._outputs.values() if output.is_over_limit]
        for output in expired:
            self._remove(output.request_id)
        return [output.fail(GenerationTimeout()) for output in expired]

    def settle_adapters(self) -> list[Output]:
        """Copies newly read adapters into slots; ends the requests for adapters that can't be served."""
        outputs: list[Output] = []
        for name, error in self._model.adapter_cache.settle().items():
            for request_id in self._scheduler.requests_waiting_for(name):
                if output := self._remove(request_id):
                    outputs.append(output.fail(error))
        return outputs

    def close(self) -> None:
        """Stops the model's background work."""
        self._model.close()

    def _remove(self, request_id: str) -> RequestOutput | None:
        output = self._outputs.pop(request_id, None)
        for seq in output.sequences if output else ():
            self._scheduler.finish(seq)
        return output


def _refusal(request_id: str, error: LorelayError, event_no: int) -> Output:
    return Output(request_id, StreamEvent(event_no=event_no, error=error.to_info()), {"error": error.code})
