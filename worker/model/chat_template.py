"""A model's chat template, which turns messages into text and tells which characters a client wrote."""

import json
import secrets
from collections.abc import Mapping
from typing import Any, Protocol

from shared.errors import InvalidRequest, ServerBusy
from shared.messages import TemplateInputs
from worker.model.marked_template import LimitExceeded, NotNow, Rendered, compile_template, render

Messages = list[dict[str, Any]]


class Renderer(Protocol):
    """The interface for code that runs chat templates."""

    def check(self, source: str) -> None:
        """Compiles a template; raises jinja2's errors if it has a wrong syntax."""

    def render(
        self, source: str, own: Mapping[str, Any], client: Mapping[str, Any], *, tenant: str | None = None
    ) -> Rendered:
        """Renders a template for a chat of `tenant`, see `marked_template.render`."""


class OwnProcess:
    """Runs chat templates in this process, without limits."""

    def check(self, source: str) -> None:
        """Compiles a template; raises jinja2's errors if it has a wrong syntax."""
        compile_template(source)

    def render(
        self, source: str, own: Mapping[str, Any], client: Mapping[str, Any], *, tenant: str | None = None
    ) -> Rendered:
        """Renders a template for a chat of `tenant`, see `marked_template.render`."""
        return render(source, own, client)


OWN_PROCESS = OwnProcess()

DEVELOPER = "developer"
_PROBE = "lorelay probe"
_PROBED_CALL = {"name": "look", "arguments": '{"probe": "lorelay"}'}
_CUT = f"CUT{secrets.token_hex(8)} "
"""Text put at the end of the last message if the answer continues this message; in the rendered chat, it
shows where the message ends. If its last character, a space, is missing, the template strips messages."""


class ChatTemplate:
    """A chat template in jinja2's language, and the form of messages that it expects."""

    def __init__(
        self, source: str, special_tokens: Mapping[str, Any], renderer: Renderer = OWN_PROCESS
    ) -> None:
        """Renders probes, to find out in which form the template expects content and arguments of tool calls.

        Raises:
            TemplateError: the template has a wrong syntax.
            LimitExceeded: `renderer` has limits, and the template exceeds them.
        """
        renderer.check(source)
        self.source = source
        self._special_tokens = special_tokens
        self._renderer = renderer
        self._reads_parts = not self._shows(_PROBE, parts=False) and self._shows(_PROBE, parts=True)
        self._reads_arguments_as_text = self._wants_text()

    def render(self, messages: Messages, inputs: TemplateInputs, tenant: str = "") -> Rendered:
        """Returns the rendered text of a chat, up to the place where the model's text begins.

        Raises:
            InvalidRequest: the template refuses the chat, or takes too much time or memory for it.
            ServerBusy: the template can't be run at the moment with any chat.
        """
        try:
            # The last message gets `_CUT` at its end, by which `_cut` finds this end in the rendered text.
            shown = _with_cut(messages) if inputs.continue_final_message else messages
            rendered = self._call(self._prepare(shown), inputs, tenant)
        except InvalidRequest:
            raise
        except NotNow as error:
            raise ServerBusy(
                f"The model's chat template can't be used now: {error}; try again later"
            ) from error
        # A template is a program and may raise any exception; only this request must fail.
        except Exception as error:
            raise InvalidRequest(
                f"The model's chat template refuses these messages: {error}", param="messages"
            ) from error
        return _cut(rendered) if inputs.continue_final_message else rendered

    def _call(self, messages: Messages, inputs: TemplateInputs, tenant: str | None = None) -> Rendered:
        own = {"add_generation_prompt": not inputs.continue_final_message, **self._special_tokens}
        client = {**inputs.variables, "messages": messages, "tools": inputs.tools or None, "documents": None}
        return self._renderer.render(self.source, own, client, tenant=tenant)

    def _prepare(self, messages: Messages) -> Messages:
        """Returns messages in the form that this template expects."""
        return [self._prepare_message(message) for message in messages]

    def _prepare_message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        prepared = {name: value for name, value in message.items() if value is not None}
        if prepared.get("role") == DEVELOPER and DEVELOPER not in self.source:
            # Most templates know only `system`, the older name of the role, and would refuse `developer`.
            prepared["role"] = "system"
        if "content" in prepared:
            prepared["content"] = self._content(prepared["content"])
        if "tool_calls" in prepared:
            prepared["tool_calls"] = [
                {**call, "function": self._call_of(call["function"])} for call in prepared["tool_calls"]
            ]
        if "function_call" in prepared:
            prepared["function_call"] = self._call_of(prepared["function_call"])
        if reasoning := prepared.get("reasoning_content"):
            prepared |= {name: prepared.get(name, reasoning) for name in ("thinking", "reasoning")}
        return prepared

    def _content(self, content: Any) -> Any:
        if isinstance(content, list) and not self._reads_parts:
            return "".join(part["text"] for part in content)
        if isinstance(content, str) and self._reads_parts:
            return [{"type": "text", "text": content}]
        return content

    def _call_of(self, function: Mapping[str, Any]) -> dict[str, Any]:
        arguments = function.get("arguments")
        if not self._reads_arguments_as_text:
            arguments = decode_arguments(arguments)
        return {**function, "arguments": arguments}

    def _shows(self, text: str, *, parts: bool) -> bool:
        content = [{"type": "text", "text": text}] if parts else text
        user = {"role": "user", "content": content}
        # Some templates refuse chats without a system message, and others chats with one.
        return any(text in self._try(chat) for chat in ([user], [{**user, "role": "system"}, user]))

    def _wants_text(self) -> bool:
        """True if the template expects a tool call's arguments as JSON text, as DeepSeek's templates do.

        If such a template gets a mapping, it fails, or prints the mapping as Python does.
        """
        text = _PROBED_CALL["arguments"]
        shown = []
        for arguments in (decode_arguments(text), text):
            call = {
                "id": "call00000",
                "type": "function",
                "function": {**_PROBED_CALL, "arguments": arguments},
            }
            user = {"role": "user", "content": self._content(_PROBE)}
            messages: Messages = [
                user,
                {"role": "assistant", "content": self._content(""), "tool_calls": [call]},
                {
                    "role": "tool",
                    "content": self._content(_PROBE),
                    "tool_call_id": "call00000",
                    "name": "look",
                },
            ]
            shown.append(self._try(messages))
        as_mapping, as_text = shown
        return text in as_text and (not as_mapping or str(decode_arguments(text)) in as_mapping)

    def _try(self, messages: Messages) -> str:
        """Returns the text of a chat; an empty text if the template refuses the chat."""
        try:
            return self._call(messages, TemplateInputs()).text
        except LimitExceeded:
            raise
        except Exception:  # whatever a template raises, it doesn't read this form
            return ""


def decode_arguments(arguments: Any) -> Any:
    """Decodes the arguments of a tool call: text that has a JSON object becomes a dict.

    None, `null` and blank text become an empty dict. Any other text stays as it is.
    """
    if arguments is None:
        return {}
    if not isinstance(arguments, str):
        return arguments
    if not arguments.strip():
        return {}
    try:
        decoded = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    if decoded is None:
        return {}
    return decoded if isinstance(decoded, dict) else arguments


def _with_cut(messages: Messages) -> Messages:
    *earlier, last = messages
    content = last.get("content")
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    if last.get("role") != "assistant" or not content:
        raise InvalidRequest(
            "There is nothing to continue: the last message must be the assistant's, with content.",
            param="continue_final_message",
        )
    return [*earlier, {**last, "content": content + _CUT}]


def _cut(rendered: Rendered) -> Rendered:
    end = rendered.text.rfind(_CUT.strip())
    if end < 0:
        raise InvalidRequest(
            "The model's chat template leaves out the end of the last message, so it can't be continued.",
            param="continue_final_message",
        )
    if not rendered.text.startswith(_CUT, end):
        # The template strips messages: without this, spaces at the message's end would stay.
        end = len(rendered.text[:end].rstrip())
    return Rendered(rendered.text[:end], rendered.mask[:end])
