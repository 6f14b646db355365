"""Turns the tokens of one request into the events of its log, and decides when it ends."""

from collections.abc import Callable, Iterable
from typing import Any

from shared.errors import LorelayError
from shared.messages import FinishReason, GenerationRequest, StreamEvent, Usage
from worker.engine.detokenizer import StopChecker
from worker.engine.records import Output
from worker.engine.sequence import Sampled, SampledToken, Sequence
from worker.engine.served_models import Detokenizer

Clock = Callable[[], float]


class RequestOutput:
    """The outgoing side of one request: text, finish reason, usage, the numbering of its events."""

    def __init__(
        self, request: GenerationRequest, seq: Sequence, detokenizer: Detokenizer, clock: Clock
    ) -> None:
        self.seq = seq
        self._request = request
        self._detokenizer = detokenizer
        self._stop_checker = StopChecker(request.sampling.stop)
        self._clock = clock
        self._started_s = clock()
        self._first_token_s: float | None = None
        self._next_event_no = 0

    def resume(self, events: Iterable[StreamEvent]) -> None:
        """Takes over from a former worker: its tokens join the sequence, its text is not sent again."""
        for event in events:
            self._next_event_no = event.event_no + 1
            self.seq.num_cached_tokens = 0  # its prompt was computed for it once, elsewhere
            for token_id in event.token_ids:
                self.seq.token_ids.append(token_id)
                text = self._detokenizer.add(token_id)
                if self._may_end:
                    self._stop_checker.add(text)

    def add(self, token: Sampled) -> Output:
        """The event of a sampled token, which stands in `seq.token_ids` already, or of an error."""
        if not isinstance(token, SampledToken):
            return self.fail(token)
        if self._first_token_s is None:
            self._first_token_s = self._clock()
        text, finish_reason = self._release(token.token_id)
        return self._event((token.token_id,), text, finish_reason)

    def abort(self) -> Output:
        """The terminal event of a request that its client gave up."""
        return self._event((), "", FinishReason.ABORT)

    def fail(self, error: LorelayError) -> Output:
        """The terminal event of a request that can't go on."""
        self.seq.finish_reason = FinishReason.ERROR
        event = StreamEvent(
            event_no=self._next_event_no, finish_reason=FinishReason.ERROR, error=error.to_info()
        )
        return Output(self.seq.request_id, event, self._meta())

    @property
    def is_over_limit(self) -> bool:
        """Whether the request ran longer than its generation limit."""
        limit_s = self._request.generation_limit_s
        return limit_s is not None and self._clock() - self._started_s > limit_s

    @property
    def _may_end(self) -> bool:
        """Whether the newest token is behind `min_tokens`: stop strings are looked for from there on only."""
        return self.seq.num_output_tokens > self.seq.sampling.min_tokens

    def _release(self, token_id: int) -> tuple[str, FinishReason | None]:
        """The text that a token releases, and whether it ends the sequence."""
        text = self._detokenizer.add(token_id)
        if self._may_end:
            text, stopped = self._stop_checker.add(text)
            if stopped:
                return text, FinishReason.STOP
        if self._may_end and not self.seq.sampling.ignore_eos and token_id in self.seq.eos_token_ids:
            return text + self._stop_checker.flush(), FinishReason.STOP
        if self.seq.num_output_tokens >= self.seq.max_tokens:
            return text + self._stop_checker.flush(), FinishReason.LENGTH
        return text, None

    def _event(self, token_ids: tuple[int, ...], text: str, finish_reason: FinishReason | None) -> Output:
        self.seq.finish_reason = finish_reason
        event = StreamEvent(
            event_no=self._next_event_no,
            index=self.seq.index,
            token_ids=token_ids,
            text=text,
            finish_reason=finish_reason,
            usage=self._usage() if finish_reason else None,
        )
        self._next_event_no += 1
        return Output(self.seq.request_id, event, self._meta() if finish_reason else None)

    def _usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.seq.num_prompt_tokens,
            completion_tokens=self.seq.num_output_tokens,
            cached_tokens=self.seq.num_cached_tokens or 0,
        )

    def _meta(self) -> dict[str, Any]:
        """What dashboards show of a finished request: never text."""
        now = self._clock()
        first_token_s = None if self._first_token_s is None else self._first_token_s - self._started_s
        return {
            "model": self._request.model,
            "adapter": self._request.adapter_name,
            "finish_reason": self.seq.finish_reason,
            "prompt_tokens": self.seq.num_prompt_tokens,
            "completion_tokens": self.seq.num_output_tokens,
            "first_token_s": first_token_s and round(first_token_s, 4),
            "total_s": round(now - self._started_s, 4),
        }
