"""Turns the tokens of one sequence into a message: content, reasoning and calls of tools."""

from collections.abc import Mapping

from shared.messages import FinishReason, ToolChoice
from worker.engine.records import MessagePart
from worker.engine.request_output import NO_MARKS, SequenceOutput
from worker.engine.sequence import Sequence
from worker.engine.tokenizer_port import MessageParser, Tokenizer


class MessageOutput(SequenceOutput):
    """The output of a sequence whose text has parts; see `MessageParser`."""

    def __init__(
        self,
        seq: Sequence,
        tokenizer: Tokenizer,
        parser: MessageParser,
        choice: ToolChoice | None,
        marks: Mapping[int, str] = NO_MARKS,
    ) -> None:
        """`marks`: the special tokens that stop strings contain, as texts by id."""
        # The text of the parser's marks is text for the stop strings, too.
        others = {token_id: text for token_id, text in marks.items() if token_id not in parser.marks}
        super().__init__(seq, tokenizer, others)
        self._parser = parser
        self._ends_after_call = choice is not None and choice.is_single
        self._num_reasoning_tokens = 0

    @property
    def num_reasoning_tokens(self) -> int:
        """Number of output tokens that belong to the model's reasoning."""
        return self._num_reasoning_tokens

    def _text_of(self, token_id: int) -> str:
        return super()._text_of(token_id) + self._parser.marks.get(token_id, "")

    def _divide(self, text: str) -> MessagePart:
        was_reasoning = self._parser.is_reasoning
        part = self._parser.add(text)
        self._num_reasoning_tokens += was_reasoning or self._parser.is_reasoning
        if self.seq.finish_reason is None and self._ends_after_call and self._parser.num_calls:
            self.seq.finish_reason = FinishReason.STOP
        if self.seq.finish_reason is not None:
            part = _joined(part, self._parser.finish(is_cut=self.seq.finish_reason is FinishReason.LENGTH))
            if self._parser.num_calls and self.seq.finish_reason is FinishReason.STOP:
                self.seq.finish_reason = FinishReason.TOOL_CALLS
        # In some formats, several calls are read at once.
        return part._replace(tool_calls=part.tool_calls[:1]) if self._ends_after_call else part


def _joined(first: MessagePart, second: MessagePart) -> MessagePart:
    return MessagePart(
        first.content + second.content,
        first.reasoning + second.reasoning,
        first.tool_calls + second.tool_calls,
    )
