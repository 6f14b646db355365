"""The format of a model's answers: how tools are described to the model, forced, and read from its text."""

import hashlib
import string
from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import TemplateError

from shared.errors import UnsupportedParameter
from shared.messages import GenerationRequest, TemplateInputs
from worker.model.call_formats import find_format, hermes
from worker.model.call_grammar import call_grammar, calls_or
from worker.model.chat_template import ChatTemplate, Messages
from worker.model.message_parser import MessageParser, MessageParsers
from worker.model.tool_prompt import with_tool_calls, with_tool_prompt

_ID_LETTERS = string.ascii_letters + string.digits
ID_LENGTH = 24


class AnswerFormat:
    """The format of the answers to the chats of one chat template."""

    def __init__(
        self,
        template: ChatTemplate,
        special_tokens: Mapping[int, str],
        added_tokens: Mapping[int, str],
        response_template: Mapping[str, Any] | None = None,
    ) -> None:
        """Renders chats with tools, to find out in which format the model writes calls.

        `special_tokens`, `added_tokens`: texts by id. `response_template`: the tokenizer's own, which takes
        precedence over the format that was found.

        Raises:
            TemplateError: the response template is malformed.
            LimitExceeded: the chat template exceeds its limits.
        """
        found = find_format(
            lambda messages, inputs: template.render(messages, inputs).text,
            response_template,
            template.source,
        )
        self._uses_tool_prompt = found is None
        """True if the chat template ignores tools."""
        self._reads_legacy_calls = "function_call" in template.source
        self._format = found or hermes(reasons="</think>" in template.source)
        try:
            self._parsers = MessageParsers(self._format)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TemplateError(f"response_template: {error}") from error
        self._added_tokens = added_tokens
        self.marks = {token: text for token, text in special_tokens.items() if self._format.mentions(text)}
        """Special tokens that mark parts of an answer, as texts by id; a parser needs these texts."""

    def prepare(self, messages: Messages, inputs: TemplateInputs) -> Messages:
        """Returns the messages as the chat template needs them to show the tools to the model."""
        if not self._reads_legacy_calls:
            messages = with_tool_calls(messages)
        if not self._uses_tool_prompt:
            return messages
        has_calls = any(message.get("tool_calls") or message.get("role") == "tool" for message in messages)
        return with_tool_prompt(messages, inputs.tools) if inputs.tools or has_calls else messages

    def grammar_of(self, request: GenerationRequest) -> str:
        """Returns the grammar that the answer must follow; empty if there is none.

        Raises:
            UnsupportedParameter: no grammar can force calls in the format of this model.
        """
        choice, answer = request.tool_choice, request.sampling.grammar
        if choice is None or not (choice.is_required or answer):
            return answer
        syntax = self._format.syntax
        if syntax is None:
            raise UnsupportedParameter(
                "The format in which this model writes calls can't be enforced: send tool_choice 'auto', "
                "without response_format.",
                param="tool_choice",
            )
        calls = call_grammar(syntax, request.template_inputs.tools, choice, self._added_tokens)
        return calls if choice.is_required else calls_or(calls, answer)

    def divides(self, request: GenerationRequest) -> bool:
        """True if answers to a chat may have calls or reasoning; then they need a parser."""
        return request.tool_choice is not None or (request.reads_reasoning and self._format.has_reasoning)

    def parser(self, request: GenerationRequest, index: int, prompt_end: str) -> MessageParser:
        """Returns the parser for one answer to a chat.

        `index`: index of the choice. `prompt_end`: the end of the prompt's text, with special tokens.
        """
        choice = request.tool_choice
        tools = request.template_inputs.tools
        known = [tool["function"]["name"] for tool in tools] if choice else []
        names = [name for name in known if choice is None or not choice.names or name in choice.names]
        new_id = _id_maker(f"{request.request_id}:{index}", self._format.id_length)
        return self._parsers.create(tools, names, new_id, self.marks, prompt_end)


def _id_maker(answer: str, length: int | None) -> Callable[[int], str]:
    """Returns the function that makes the ids of an answer's calls, the same ids in every worker."""

    def new_id(number: int) -> str:
        digest = hashlib.sha256(f"{answer}:{number}".encode()).digest()
        letters = "".join(_ID_LETTERS[byte % len(_ID_LETTERS)] for byte in digest)
        return f"call_{letters[:ID_LENGTH]}" if length is None else letters[:length]

    return new_id
