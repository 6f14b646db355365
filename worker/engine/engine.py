"""The engine: requests in, events out, one step at a time. `Engine.step` is the architecture."""

import logging
import time
from collections.abc import Iterable
from collections.abc import Sequence as Items
from typing import Any, Protocol

from shared.errors import (
    ContextLengthExceeded,
    GenerationFailed,
    GenerationStopped,
    GenerationTimeout,
    LorelayError,
)
from shared.logs import fields
from shared.messages import GenerationRequest, SamplingParams, StreamEvent
from worker.engine.adapter_cache import AdapterCache
from worker.engine.records import Output, Prompt
from worker.engine.request_output import Clock, RequestOutput
from worker.engine.scheduler import Scheduler
from worker.engine.sequence import Batch, Sampled, Sequence, SequenceStatus
from worker.engine.served_models import ServedModels

logger = logging.getLogger(__name__)


class ModelRunner(Protocol):
    """What the engine needs of the device; see `worker.model.model_runner`."""

    @property
    def max_model_len(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def served(self) -> ServedModels: ...

    def run(self, batch: Batch) -> Items[Sampled]: ...


class Engine:
    """Runs many requests of different adapters in one batch. Single-threaded; does no network I/O."""

    def __init__(
        self,
        model_runner: ModelRunner,
        scheduler: Scheduler,
        clock: Clock = time.monotonic,
        adapters: AdapterCache[Any] | None = None,
    ) -> None:
        """`adapters`: the scheduler's; None where all are resident."""
        self._model_runner = model_runner
        self._scheduler = scheduler
        self._clock = clock
        self._adapters = adapters
        self._outputs: dict[str, RequestOutput] = {}
        self._batch: Batch = []
        self.is_stalled = False
        """Whether the last step ran nothing, because all that could run waits for an adapter."""

    @property
    def has_work(self) -> bool:
        """Whether a step would run anything."""
        return self._scheduler.has_work

    @property
    def remains(self) -> str:
        """What it holds, for a log line: nothing but zeros when all requests have ended."""
        return f"{len(self._outputs)} requests, {self._scheduler.num_blocks_in_use} cache blocks in use"

    def step(self) -> list[Output]:
        """Runs one batch and returns the events it brought, at most one per request."""
        self._batch = batch = self._scheduler.schedule()
        self.is_stalled = not batch
        if self.is_stalled:
            return []
        sampled = self._scheduler.postprocess(batch, self._model_runner.run(batch))
        return [self._emit(seq, token) for seq, token in sampled]

    def add_request(
        self,
        request: GenerationRequest,
        events: Iterable[StreamEvent] = (),
        *,
        prompt: Prompt | None = None,
        alone: bool = False,
    ) -> list[Output]:
        """Takes a request in; `events` is what its log holds already, `prompt` what came of encoding it.

        `alone`: nothing runs until `run_alone`, then its steps without the others until `allow_company`, so
        that a crash is its own.
        A request that can't run ends here: the list then holds its terminal error event, else it is empty.
        """
        self.drop_request(request.request_id)
        events = tuple(events)
        try:
            output = self._prepare(request, prompt)
            output.resume(events)
            self._check_log(output.seq)
        except LorelayError as error:
            return [_refusal(request.request_id, error, len(events))]
        # Nothing but this request is at work here, so nothing else can be at fault.
        except Exception:
            logger.exception("request %s can't be taken in", request.request_id, extra=fields("add_request"))
            return [_refusal(request.request_id, GenerationFailed(), len(events))]
        self._outputs[request.request_id] = output
        self._scheduler.add(output.seq)
        if alone:
            self._scheduler.isolate(output.seq)
        return []

    def run_alone(self) -> None:
        """It is known that a crash from now on is that of the request which was added to run alone."""
        self._scheduler.run_isolated()

    def allow_company(self) -> None:
        """The request that ran alone is beyond doubt: all run together again."""
        self._scheduler.isolate(None)

    def holds(self, request_id: str) -> bool:
        """Whether this request is here and has not ended."""
        return request_id in self._outputs

    def abort_request(self, request_id: str) -> list[Output]:
        """Ends a request that its client gave up; nothing if it has ended already."""
        output = self._remove(request_id)
        return [output.abort()] if output else []

    def stop_request(self, request_id: str) -> list[Output]:
        """Ends a request that an operator stopped, with an error; nothing if it is not here."""
        output = self._remove(request_id)
        return [output.fail(GenerationStopped())] if output else []

    def drop_request(self, request_id: str) -> None:
        """Forgets a request that another worker owns now: no event."""
        self._remove(request_id)

    def shed(self) -> tuple[str | None, list[Output]]:
        """Makes room after a step that did not fit into memory: its newest request, to be handed back.

        One that did not fit even alone ends with an error instead.
        """
        ran = {scheduled.seq.request_id for scheduled in self._batch}
        newest = next(request_id for request_id in reversed(self._outputs) if request_id in ran)
        output = self._outputs[newest]
        self._remove(newest)
        if len(ran) > 1:
            return newest, []
        return None, [output.fail(GenerationFailed("The request does not fit into the device's memory."))]

    def expire_requests(self) -> list[Output]:
        """Ends the requests that are over their generation limit."""
        expired = [output for output in self._outputs.values() if output.is_over_limit]
        for output in expired:
            self._remove(output.seq.request_id)
        return [output.fail(GenerationTimeout()) for output in expired]

    def settle_adapters(self) -> list[Output]:
        """Takes in the adapters that were read since; ends the requests of those that can't be served."""
        if self._adapters is None:
            return []
        outputs: list[Output] = []
        for name, error in self._adapters.settle().items():
            for seq in self._scheduler.waiting_for(name):
                output = self._outputs[seq.request_id]
                self._remove(seq.request_id)
                outputs.append(output.fail(error))
        return outputs

    def _prepare(self, request: GenerationRequest, prompt: Prompt | None) -> RequestOutput:
        model = self._model_runner.served.model_of(request)
        if prompt is None:
            prompt = model.tokenizer.encode_chat(request.messages)
        if isinstance(prompt, LorelayError):
            raise prompt
        seq = Sequence(
            request_id=request.request_id,
            index=0,
            adapter_name=request.adapter_name,
            sampling=request.sampling,
            token_ids=prompt,
            num_prompt_tokens=len(prompt),
            max_tokens=self._num_tokens_to_generate(len(prompt), request.sampling),
            eos_token_ids=model.tokenizer.eos_token_ids,
            adapter_version=model.version if model.adapter_name else None,
        )
        return RequestOutput(request, seq, model.tokenizer.detokenizer(), self._clock)

    def _check_log(self, seq: Sequence) -> None:
        """Refuses tokens of a former worker that no worker could have written.

        Raises:
            GenerationFailed: they are more than the request may have, or not of this model's vocabulary.
        """
        if seq.num_output_tokens >= seq.max_tokens:
            raise GenerationFailed("The log of the request can't be read: more tokens than were asked for.")
        vocab_size = self._model_runner.vocab_size
        if not all(0 <= token_id < vocab_size for token_id in seq.token_ids[seq.num_prompt_tokens :]):
            raise GenerationFailed("The log of the request can't be read: a token that the model lacks.")

    def _num_tokens_to_generate(self, num_prompt_tokens: int, sampling: SamplingParams) -> int:
        context = self._model_runner.max_model_len
        asked = sampling.max_tokens or sampling.min_tokens
        if num_prompt_tokens + (asked or 1) > context:
            completion = f" and {asked} for the completion" if asked else ""
            is_minimum = not sampling.max_tokens and num_prompt_tokens < context
            raise ContextLengthExceeded(
                f"This model's maximum context length is {context} tokens, but {num_prompt_tokens} tokens "
                f"were given in the messages{completion}{' (min_tokens)' if is_minimum else ''}.",
                param="min_tokens" if is_minimum else None,
            )
        return sampling.max_tokens or context - num_prompt_tokens

    def _emit(self, seq: Sequence, token: Sampled) -> Output:
        output = self._outputs[seq.request_id]
        emitted = output.add(token)
        if emitted.event.is_terminal:
            self._remove(seq.request_id)
        return emitted

    def _remove(self, request_id: str) -> RequestOutput | None:
        output = self._outputs.pop(request_id, None)
        if output and output.seq.status is not SequenceStatus.FINISHED:
            self._scheduler.finish(output.seq)
        return output


def _refusal(request_id: str, error: LorelayError, event_no: int) -> Output:
    return Output(request_id, StreamEvent(event_no=event_no, error=error.to_info()), {"error": error.code})
