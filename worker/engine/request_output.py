"""Turns the tokens of one request into events, and decides when the request ends."""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from shared.errors import GenerationFailed, LorelayError
from shared.messages import (
    MIN_LOGPROB,
    FinishReason,
    GenerationRequest,
    PositionLogprobs,
    StreamEvent,
    TokenLogprob,
    Usage,
)
from worker.engine.detokenizer import StopChecker
from worker.engine.records import MessagePart, Output
from worker.engine.sequence import Sampled, SampledToken, Sequence, SequenceStatus
from worker.engine.tokenizer_port import Tokenizer

Clock = Callable[[], float]
NO_MARKS: Mapping[int, str] = MappingProxyType({})


class SequenceOutput:
    """Turns the tokens of one sequence into text, and decides at which token the sequence ends."""

    def __init__(
        self, seq: Sequence, tokenizer: Tokenizer, marks: Mapping[int, str] = NO_MARKS, prefix: str = ""
    ) -> None:
        """`marks`: the special tokens that stop strings contain, as texts by id.

        `prefix`: text that precedes the text of the first token, such as the prompt.
        """
        self.seq = seq
        self._prefix = prefix
        self._token_bytes = tokenizer.token_bytes
        self._marks = marks
        self._detokenizer = tokenizer.detokenizer()
        self._stop_checker = StopChecker(seq.sampling.stop, includes_stop=seq.sampling.includes_stop)
        self._stop_token_ids = frozenset(seq.sampling.stop_token_ids)

    def resume(self, event: StreamEvent) -> None:
        """Adds the tokens of an event that an earlier worker wrote; the event's text is not sent again."""
        if event.finish_reason is not None:
            self.seq.finish_reason, self.seq.status = event.finish_reason, SequenceStatus.FINISHED
        for token_id in event.token_ids:
            self._prefix = ""
            self.seq.token_ids.append(token_id)
            self._divide(self._replay(token_id))

    def add(self, token_id: int) -> MessagePart:
        """Adds a token, and returns the part of the message that it completes; may set the finish reason.

        The token must be in `seq.token_ids` already. Stop strings within the first `min_tokens` are ignored.
        """
        text = self._complete(token_id)
        if self._prefix:
            text, self._prefix = self._prefix + text, ""
        return self._divide(text)

    @property
    def num_reasoning_tokens(self) -> int:
        """Number of output tokens that belong to the model's reasoning."""
        return 0

    def _divide(self, text: str) -> MessagePart:
        """Returns the part of the message that consists of the text of one token."""
        return MessagePart(text)

    def _text_of(self, token_id: int) -> str:
        """Returns the text that a token adds."""
        return self._detokenizer.add(token_id)

    def _replay(self, token_id: int) -> str:
        """Returns the text that a token of the log completed, unless it ended the sequence."""
        text = self._text_of(token_id)
        if self.seq.num_output_tokens > self.seq.sampling.min_tokens:
            text, _ = self._stop_checker.add(text, self._marks.get(token_id, ""))
        return text

    def _complete(self, token_id: int) -> str:
        seq = self.seq
        # A grammar allows an end token only where the output may end; its own text would break the form.
        ends_grammar = bool(seq.sampling.grammar) and token_id in seq.eos_token_ids
        num_tokens = seq.num_output_tokens
        may_end = num_tokens > seq.sampling.min_tokens
        is_stop = may_end and token_id in self._stop_token_ids
        is_hidden = ends_grammar or (is_stop and not seq.sampling.includes_stop)
        text = "" if is_hidden else self._text_of(token_id)
        if may_end:
            text, stopped = self._stop_checker.add(text, self._marks.get(token_id, ""))
            if stopped:
                seq.finish_reason = FinishReason.STOP
                return text
        is_end = may_end and token_id in seq.eos_token_ids and not seq.sampling.ignore_eos
        if is_end or is_stop or ends_grammar:
            seq.finish_reason = FinishReason.STOP
        elif num_tokens >= seq.max_tokens:
            seq.finish_reason = FinishReason.LENGTH
        else:
            return text
        return text + self._stop_checker.flush()

    def logprobs(self, token: SampledToken) -> tuple[PositionLogprobs, ...] | None:
        """Returns the log probabilities at a token's position; None if the request did not ask for them."""
        if token.logprob is None:
            return None
        top = tuple(self._entry(token_id, logprob) for token_id, logprob in token.alternatives)
        return (PositionLogprobs(self._entry(token.token_id, token.logprob), top),)

    def _entry(self, token_id: int, logprob: float) -> TokenLogprob:
        return TokenLogprob(token_id, self._token_bytes(token_id), max(logprob, MIN_LOGPROB))


class RequestOutput:
    """Creates the events of a request from the tokens of all its sequences; the last event has the usage."""

    def __init__(self, request: GenerationRequest, outputs: list[SequenceOutput], clock: Clock) -> None:
        """Expects `outputs` in the order of `seq.index`. Does not keep `request`, which may be megabytes."""
        self.request_id = request.request_id
        self._model, self._adapter_name = request.model, request.adapter_name
        self._limit_s, self._num_choices = request.generation_limit_s, request.n
        self._tells_usage_so_far = request.continuous_usage
        self._outputs = outputs
        self._num_running = len(outputs)
        self._clock = clock
        self._started_s = clock()
        self._first_run_s: float | None = None
        self._first_token_s: float | None = None
        self._next_event_no = 0

    @property
    def sequences(self) -> list[Sequence]:
        """The sequences that have not ended."""
        seqs = (output.seq for output in self._outputs)
        return [seq for seq in seqs if seq.status is not SequenceStatus.FINISHED]

    def resume(self, events: Iterable[StreamEvent]) -> None:
        """Replays an earlier worker's log: each sequence that has not ended continues after its last event.

        Raises:
            GenerationFailed: the log has more sequences than the request.
        """
        for event in events:
            if not 0 <= event.index < len(self._outputs):
                raise GenerationFailed("The log of the request can't be read: more sequences than asked for.")
            self._outputs[event.index].resume(event)
            self._next_event_no = event.event_no + 1
        if self._next_event_no:
            self._num_running = len(self.sequences)
            for output in self._outputs:
                # The earlier worker computed the prompt, so usage must not report it as cached.
                output.seq.num_cached_tokens = 0

    def note_run(self) -> bool:
        """Records when a sequence runs for the first time; returns False while all sequences wait."""
        if all(output.seq.status is SequenceStatus.WAITING for output in self._outputs):
            return False
        self._first_run_s = self._clock()
        return True

    def add(self, index: int, token: Sampled) -> Output:
        """Returns the event for a sequence's new token. If `token` is an error, it ends the whole request."""
        if not isinstance(token, SampledToken):
            return self.fail(token)
        if self._first_token_s is None:
            self._first_token_s = self._clock()
        output = self._outputs[index]
        try:
            part = output.add(token.token_id)
        except LorelayError as error:
            return self.fail(error)
        finish_reason = output.seq.finish_reason
        self._num_running -= finish_reason is not None
        return self._event(index, (token.token_id,), part, finish_reason, output.logprobs(token))

    def abort(self) -> Output:
        """Returns the terminal event of a request whose client disconnected or canceled."""
        self._num_running = 0
        return self._event(0, (), MessagePart(), FinishReason.ABORT)

    def fail(self, error: LorelayError) -> Output:
        """Returns the terminal event of a request that ends with an error."""
        event = StreamEvent(
            event_no=self._next_event_no, finish_reason=FinishReason.ERROR, error=error.to_info()
        )
        return Output(self.request_id, event, self._meta(FinishReason.ERROR))

    @property
    def is_over_limit(self) -> bool:
        """True if the request has run longer than its generation limit."""
        return self._limit_s is not None and self._clock() - self._started_s > self._limit_s

    def _event(
        self,
        index: int,
        token_ids: tuple[int, ...],
        part: MessagePart,
        finish_reason: FinishReason | None,
        logprobs: tuple[PositionLogprobs, ...] | None = None,
    ) -> Output:
        """Returns the next event, which is the terminal event if no sequence is running any more."""
        event_no, has_ended = self._next_event_no, not self._num_running
        self._next_event_no += 1
        usage = self._usage() if has_ended else None
        is_first = self._tells_usage_so_far and event_no == 0 and not has_ended
        so_far = self._usage() if is_first else None
        event = StreamEvent(
            event_no,
            index,
            token_ids,
            part.content,
            logprobs,
            finish_reason,
            usage,
            usage_so_far=so_far,
            reasoning=part.reasoning,
            tool_calls=part.tool_calls,
            reasoning_tokens=sum(output.num_reasoning_tokens for output in self._outputs) if has_ended else 0,
        )
        return Output(self.request_id, event, self._meta(finish_reason) if has_ended else None)

    def _usage(self) -> Usage:
        """Returns the token counts of the whole request; a prompt counts once, not once per choice."""
        seqs = [output.seq for output in self._outputs]
        firsts = range(0, len(seqs), self._num_choices)
        by_prompt = [seqs[first : first + self._num_choices] for first in firsts]
        return Usage(
            prompt_tokens=sum(choices[0].num_prompt_tokens for choices in by_prompt),
            completion_tokens=sum(seq.num_output_tokens for seq in seqs),
            # The choice with the fewest cached tokens computed the prompt; other choices reused its blocks.
            cached_tokens=sum(min(seq.num_cached_tokens or 0 for seq in choices) for choices in by_prompt),
        )

    def _meta(self, finish_reason: FinishReason | None) -> dict[str, Any]:
        """Returns facts about a finished request for the job's field `meta`, without prompts or answers."""
        now = self._clock()
        usage = self._usage()
        return {
            "model": self._model,
            "adapter": self._adapter_name,
            "finish_reason": finish_reason,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "first_token_s": _between(self._started_s, self._first_token_s),
            "load_s": _between(self._started_s, self._first_run_s),
            "prefill_s": _between(self._first_run_s, self._first_token_s),
            "decode_s": _between(self._first_token_s, now),
            "total_s": round(now - self._started_s, 4),
        }


def _between(begin_s: float | None, end_s: float | None) -> float | None:
    """Returns the seconds between two times; None if one of the two is None."""
    return None if begin_s is None or end_s is None else round(end_s - begin_s, 4)
