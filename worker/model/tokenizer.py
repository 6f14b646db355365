"""The model's tokenizer and chat template."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from jinja2 import TemplateError

from shared.errors import ConfigurationError, InvalidRequest
from shared.messages import NO_INPUTS, GenerationRequest, TemplateInputs
from worker.engine.detokenizer import Detokenizer
from worker.model.answer_format import AnswerFormat
from worker.model.chat_template import OWN_PROCESS, ChatTemplate, Renderer
from worker.model.control_tokens import ControlTokens
from worker.model.marked_template import Rendered
from worker.model.marked_text import CLIENT, OWN
from worker.model.message_parser import MessageParser
from worker.model.token_bytes import max_token_bytes
from worker.model.token_pieces import TokenPieces

_PROBE = "lorelay probe"
NUM_END_TOKENS = 256
"""Number of tokens at the end of a prompt in which the beginning of the answer is looked for."""


class Tokenizer:
    """Turns messages into token ids, and token ids into text. Methods may be called from any thread."""

    def __init__(
        self,
        backend: Any,
        generation_eos: frozenset[int],
        *,
        parses_control_tokens: bool = False,
        renderer: Renderer = OWN_PROCESS,
    ) -> None:
        """Wraps `backend`, a transformers tokenizer with a chat template.

        `generation_eos` are ids that end a sequence besides the tokenizer's own. If `parses_control_tokens`
        is true, the text of a control token in a message becomes that token. `renderer` runs the
        chat templates.

        Raises:
            TemplateError: the chat template has a wrong syntax.
            LimitExceeded: `renderer` has limits, and the chat template exceeds them.
        """
        self.backend = backend
        self.generation_eos = generation_eos
        self.parses_control_tokens = parses_control_tokens
        self.eos_token_ids = generation_eos | as_ids(backend.eos_token_id)
        """Ids of the tokens that end a sequence, from the tokenizer and the model's generation config."""
        self.special_tokens: Mapping[int, str] = {
            token_id: token.content
            for token_id, token in backend.added_tokens_decoder.items()
            if token.special
        }
        """The text of each special token by its id; `decode` skips these tokens."""
        self.token_bytes = TokenPieces(backend).bytes_of
        """Returns the bytes that a token stands for, by its id."""
        self._silent: dict[int, bool] = {}
        self._fast = getattr(backend, "backend_tokenizer", None)
        self._templates: dict[str, ChatTemplate] = {}
        self._formats: dict[str, AnswerFormat] = {}
        added_tokens = {id_: token.content for id_, token in backend.added_tokens_decoder.items()}
        for source in sorted(templates_of(backend)):
            template = ChatTemplate(source, backend.special_tokens_map, renderer)
            self._templates[source] = template
            self._formats[source] = AnswerFormat(
                template, self.special_tokens, added_tokens, response_template_of(backend)
            )
        tools: list[dict[str, Any]] = [{}]
        self._source_with_tools, self._source_without_tools = (
            str(backend.get_chat_template(tools=given)) if self._templates else "" for given in (tools, None)
        )
        if self._fast is not None:
            self._fast.no_truncation()
            self._fast.no_padding()
            self._control_tokens = ControlTokens(self._fast, "\n".join(self._templates))

    @classmethod
    def load(
        cls,
        folder_or_id: str | Path,
        revision: str | None = None,
        trust_remote_code: bool = False,
        parses_control_tokens: bool = False,
    ) -> Self:
        """Loads the tokenizer of a model folder or Hugging Face id.

        Raises:
            ConfigurationError: there is no tokenizer, or its chat template can't be used.
        """
        from transformers import AutoTokenizer

        try:
            backend = AutoTokenizer.from_pretrained(
                folder_or_id, revision=revision, trust_remote_code=trust_remote_code
            )
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ConfigurationError(
                f"LORELAY_MODEL: {folder_or_id} has no tokenizer that loads: {error}"
            ) from error
        generation_eos = as_ids(_generation_eos(folder_or_id, revision))
        try:
            return cls(backend, generation_eos, parses_control_tokens=parses_control_tokens)
        except TemplateError as error:
            raise ConfigurationError(
                f"LORELAY_MODEL: {folder_or_id} has a chat template that can't be compiled: {error}"
            ) from error

    @cached_property
    def max_token_bytes(self) -> int:
        """Maximum number of bytes of a user's messages per token; 0 if there is no such maximum."""
        template = self._templates.get(self._source(has_tools=False))
        if self._fast is None or template is None or not _keeps_user_text(template):
            return 0
        return max_token_bytes(json.loads(self._fast.to_str()))

    def encode_chat(
        self, messages: list[dict[str, Any]], inputs: TemplateInputs = NO_INPUTS, tenant: str = ""
    ) -> list[int]:
        """Returns the token ids of a chat: messages in the model's template, up to the assistant's turn.

        If `inputs` asks to continue the last message, the ids end inside this message. Special tokens,
        including BOS, come only from the template. The tokenizer adds none.

        Raises:
            InvalidRequest: the template refuses the messages, or there is no template.
            ServerBusy: the template can't be run at the moment for chats of this tenant.
        """
        if not self._templates:
            raise InvalidRequest(
                "The model has no chat template and can't answer chats: send a prompt to /v1/completions.",
                param="messages",
            )
        source = self._source(has_tools=bool(inputs.tools))
        shown = self._formats[source].prepare(messages, inputs)
        rendered = self._templates[source].render(shown, inputs, tenant)
        return self._encode(rendered, "messages")

    def encode_text(self, text: str) -> list[int]:
        """Returns the token ids of a text, with the special tokens that the tokenizer adds to every text.

        The names of control tokens in the text become these tokens.

        Raises:
            InvalidRequest: the text can't be tokenized.
        """
        return self._encode(Rendered(text, OWN * len(text)), "prompt", add_special_tokens=True)

    @property
    def template_sources(self) -> frozenset[str]:
        """The sources of the chat templates: one for all chats, or a second one for chats with tools."""
        return frozenset(self._templates)

    def grammar_of(self, request: GenerationRequest) -> str:
        """Returns the grammar that answers to a request must follow; empty if there is none.

        Raises:
            UnsupportedParameter: the request demands calls of tools, and no grammar can force the model.
        """
        return request.sampling.grammar if request.prompts else self._format(request).grammar_of(request)

    def message_parser(
        self, request: GenerationRequest, index: int, prompt: Sequence[int]
    ) -> MessageParser | None:
        """Returns the parser for the choice with this index; None if the answer is only text."""
        answers = self._format(request)
        if not answers.divides(request):
            return None
        end = self.backend.decode(prompt[-NUM_END_TOKENS:], skip_special_tokens=False)
        return answers.parser(request, index, str(end))

    def _format(self, request: GenerationRequest) -> AnswerFormat:
        return self._formats[self._source(has_tools=bool(request.template_inputs.tools))]

    def _source(self, *, has_tools: bool) -> str:
        return self._source_with_tools if has_tools else self._source_without_tools

    def _encode(self, rendered: Rendered, param: str, *, add_special_tokens: bool = False) -> list[int]:
        text, mask = rendered
        if self.parses_control_tokens:
            mask = OWN * len(text)
        try:
            if self._fast is not None:
                return self._control_tokens.encode(text, mask, add_special_tokens=add_special_tokens)
            if (found := _find_of_client(self.backend, text, mask)) is None:
                return list(self.backend(text, add_special_tokens=add_special_tokens)["input_ids"])
        # Tokenizers raise errors of many kinds, e.g. for half a surrogate pair.
        except Exception as error:
            raise InvalidRequest(f"The prompt can't be tokenized: {error}", param=param) from error
        raise InvalidRequest(
            f"The prompt contains {found!r}, a control token, which this model's tokenizer can't encode as "
            "text. Leave it out or change it.",
            param=param,
        )

    def says_the_same(self, other: "Tokenizer") -> bool:
        """Returns True if both tokenizers encode and decode everything alike, with the same end tokens."""
        return _identity(self) == _identity(other)

    @property
    def definition(self) -> str | None:
        """The definition of the tokenizer, as JSON in the format of `tokenizer.json`; None if it has none."""
        return None if self._fast is None else str(self._fast.to_str())

    def decode(self, token_ids: Sequence[int]) -> str:
        """Returns the text of `token_ids` without special tokens."""
        if self._fast is not None:
            return str(self._fast.decode(list(token_ids), skip_special_tokens=True))
        return str(
            self.backend.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    def detokenizer(self) -> Detokenizer:
        """Returns a new detokenizer for one sequence."""
        return Detokenizer(self.decode, self._is_silent)

    def _is_silent(self, token_id: int) -> bool:
        """True for a token that `decode` skips wherever it stands: special, or beyond the vocabulary."""
        silent = self._silent.get(token_id)
        if silent is None:
            is_unknown = self._fast is not None and self._fast.id_to_token(token_id) is None
            silent = self._silent[token_id] = is_unknown or token_id in self.special_tokens
        return silent


def _identity(tokenizer: Tokenizer) -> tuple[Any, ...]:
    """Returns all that decides how a tokenizer encodes and decodes."""
    backend, rules = tokenizer.backend, tokenizer.definition
    names, eos_token_ids = backend.special_tokens_map, tokenizer.eos_token_ids
    rules = backend.get_vocab() if rules is None else rules
    return rules, backend.chat_template, names, eos_token_ids, response_template_of(backend)


def templates_of(backend: Any) -> set[str]:
    """Returns the sources of a tokenizer's chat templates: none, one, or one for each purpose."""
    sources = backend.chat_template or {}
    return set(sources.values()) if isinstance(sources, dict) else {sources}


def response_template_of(backend: Any) -> Any:
    """Returns the response template in a tokenizer's config, which says how answers are divided, or None."""
    return getattr(backend, "response_template", None)


def _keeps_user_text(template: ChatTemplate) -> bool:
    """True if a chat has the text of all user messages, except for spaces at their ends."""
    texts = [f"{_PROBE} {number}\n\n\t  {_PROBE}" for number in range(3)]
    messages: list[dict[str, Any]] = []
    for text in texts:
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
    try:
        rendered = template.render(messages[:-1], NO_INPUTS)
    except InvalidRequest:
        return False
    return all(text in rendered.text for text in texts)


def _find_of_client(backend: Any, text: str, mask: bytes) -> str | None:
    """Returns the text of a control token that a client wrote, wholly or in part; None without one."""
    for token in backend.added_tokens_encoder:
        start = text.find(token)
        while start >= 0:
            if mask.find(CLIENT, start, start + len(token)) >= 0:
                return str(token)
            start = text.find(token, start + 1)
    return None


def _generation_eos(folder_or_id: str | Path, revision: str | None) -> Any:
    """Returns the EOS ids in the model's `generation_config.json`, else in its `config.json`."""
    from transformers import GenerationConfig, PreTrainedConfig

    try:
        return GenerationConfig.from_pretrained(folder_or_id, revision=revision or "main").eos_token_id
    except OSError:
        config, _ = PreTrainedConfig.get_config_dict(folder_or_id, revision=revision)
        return config.get("eos_token_id")


def as_ids(entry: int | list[int] | None) -> frozenset[int]:
    """Returns the token ids in an entry of a config: one, several or none."""
    if entry is None:
        return frozenset()
    return frozenset([entry] if isinstance(entry, int) else entry)
