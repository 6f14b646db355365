"""The port `Tokenizer`: all that an engine needs of the tokenizer of a base or adapter."""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from typing import Any, Protocol

from shared.messages import NO_INPUTS, GenerationRequest, TemplateInputs
from worker.engine.records import MessagePart


class Detokenizer(Protocol):
    """Turns the tokens of one sequence into text, token by token; see `worker.engine.detokenizer`."""

    def add(self, token_id: int) -> str:
        """Returns the text that can be released after this token, possibly none."""
        ...


class MessageParser(Protocol):
    """Divides the text of one answer into content, reasoning and calls; see `worker.model.message_parser`."""

    @property
    def marks(self) -> Mapping[int, str]:
        """Special tokens whose text `add` must get, as texts by id."""
        ...

    @property
    def num_calls(self) -> int:
        """Number of calls found so far."""
        ...

    @property
    def is_reasoning(self) -> bool:
        """True if the next text belongs to the reasoning."""
        ...

    def add(self, text: str) -> MessagePart:
        """Returns the parts of the message that a piece of text completes."""
        ...

    def finish(self, *, is_cut: bool) -> MessagePart:
        """Returns the last parts. If the answer was cut in a call, the call's arguments are incomplete."""
        ...


class Tokenizer(Protocol):
    """Converts prompts to token ids, and token ids to text; thread-safe. See `worker.model.tokenizer`."""

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Ids of the tokens that end a sequence."""
        ...

    @property
    def special_tokens(self) -> Mapping[int, str]:
        """The text of each special token by its id; detokenizers return no text for these tokens."""
        ...

    @property
    def max_token_bytes(self) -> int:
        """Maximum number of bytes (UTF-8) of a user's messages per token of a chat; 0 without a bound."""
        ...

    def encode_chat(
        self, messages: list[dict[str, Any]], inputs: TemplateInputs = NO_INPUTS, tenant: str = ""
    ) -> list[int]:
        """Returns the token ids of a chat.

        Raises:
            InvalidRequest: the template refuses the chat.
            ServerBusy: the template can't be run at the moment for chats of this tenant.
        """
        ...

    def encode_text(self, text: str) -> list[int]:
        """Returns the token ids of a text, in which the names of control tokens become these tokens.

        Raises:
            InvalidRequest: the text can't be tokenized.
        """
        ...

    def detokenizer(self) -> Detokenizer:
        """Returns a new detokenizer for one sequence."""
        ...

    def grammar_of(self, request: GenerationRequest) -> str:
        """Returns the grammar that answers to a request must follow; empty if there is none.

        Raises:
            UnsupportedParameter: the request demands calls of tools, and no grammar can force the model.
        """
        ...

    def message_parser(
        self, request: GenerationRequest, index: int, prompt: Items[int]
    ) -> MessageParser | None:
        """Returns the parser for the choice with this index; None if the answer is only text."""
        ...

    @property
    def token_bytes(self) -> Callable[[int], bytes]:
        """Function that returns the bytes of a token by its id; the bytes may be a part of a character."""
        ...

    @property
    def definition(self) -> str | None:
        """The definition of the tokenizer, as JSON in the format of `tokenizer.json`; None if it has none."""
        ...
