"""The model's tokenizer and chat template."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from jinja2 import TemplateError

from shared.errors import ConfigurationError, InvalidRequest
from shared.messages import NO_INPUTS, TemplateInputs
from worker.engine.detokenizer import Detokenizer
from worker.model.chat_template import ChatTemplate
from worker.model.control_tokens import ControlTokens
from worker.model.marked_template import Rendered
from worker.model.marked_text import CLIENT, OWN


class Tokenizer:
    """Turns messages into token ids, and token ids into text. Methods may be called from any thread."""

    def __init__(
        self, backend: Any, eos_token_ids: frozenset[int], *, parses_control_tokens: bool = False
    ) -> None:
        """Wraps `backend`, a transformers tokenizer with a chat template.

        With `parses_control_tokens`, the text of a control token in a message or prompt becomes that token.

        Raises:
            TemplateError: the chat template has a wrong syntax.
        """
        self.backend = backend
        self.eos_token_ids = eos_token_ids
        """Ids of the tokens that end a sequence, from the tokenizer and the model's generation config."""
        self.special_tokens: Mapping[int, str] = {
            token_id: token.content
            for token_id, token in backend.added_tokens_decoder.items()
            if token.special
        }
        """The text of each special token by its id; `decode` skips these tokens."""
        self._silent: dict[int, bool] = {}
        self._fast = getattr(backend, "backend_tokenizer", None)
        self._parses_control_tokens = parses_control_tokens
        self._templates: dict[str, ChatTemplate] = {}
        sources = backend.chat_template
        for source in sources.values() if isinstance(sources, dict) else [sources]:
            self._templates[source] = ChatTemplate(source, backend.special_tokens_map)
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
            ConfigurationError: there is no tokenizer, or it has no chat template that can be used.
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
        if not backend.chat_template:
            raise ConfigurationError(f"LORELAY_MODEL: {folder_or_id} has no chat template")
        declared = [backend.eos_token_id, _generation_eos(folder_or_id, revision)]
        eos_token_ids = frozenset(token_id for entry in declared for token_id in _as_list(entry))
        try:
            return cls(backend, eos_token_ids, parses_control_tokens=parses_control_tokens)
        except TemplateError as error:
            raise ConfigurationError(
                f"LORELAY_MODEL: {folder_or_id} has a chat template that can't be compiled: {error}"
            ) from error

    def encode_chat(self, messages: list[dict[str, Any]], inputs: TemplateInputs = NO_INPUTS) -> list[int]:
        """Returns the token ids of a chat: messages in the model's template, up to the assistant's turn.

        If `inputs` continues the last message, the ids end inside of this message. Special tokens, including
        BOS, come only from the template; the tokenizer adds none.

        Raises:
            InvalidRequest: the template refuses the messages.
        """
        rendered = self._template(has_tools=bool(inputs.tools)).render(messages, inputs)
        return self._encode(rendered, "messages")

    def encode_text(self, text: str) -> list[int]:
        """Returns the token ids of a text, with the special tokens that the tokenizer adds to every text.

        Raises:
            InvalidRequest: the text can't be tokenized.
        """
        return self._encode(Rendered(text, CLIENT * len(text)), "prompt", add_special_tokens=True)

    def _template(self, *, has_tools: bool) -> ChatTemplate:
        """Returns the chat template; a tokenizer may have another one for chats with tools."""
        return self._templates[self.backend.get_chat_template(tools=[{}] if has_tools else None)]

    def _encode(self, rendered: Rendered, param: str, *, add_special_tokens: bool = False) -> list[int]:
        text, mask = rendered
        if self._parses_control_tokens:
            mask = OWN * len(text)
        try:
            if self._fast is not None:
                return self._control_tokens.encode(text, mask, add_special_tokens=add_special_tokens)
            if (found := self._find_of_client(text, mask)) is None:
                return list(self.backend(text, add_special_tokens=add_special_tokens)["input_ids"])
        # Tokenizers raise errors of many kinds, e.g. for half a surrogate pair.
        except Exception as error:
            raise InvalidRequest(f"The prompt can't be tokenized: {error}", param=param) from error
        raise InvalidRequest(
            f"The prompt contains {found!r}, a control token, which this model's tokenizer can't encode as "
            "text. Leave it out or change it.",
            param=param,
        )

    def _find_of_client(self, text: str, mask: bytes) -> str | None:
        """Returns the text of a control token of which a client wrote a part, or None."""
        for token in self.backend.added_tokens_encoder:
            start = text.find(token)
            while start >= 0:
                if mask.find(CLIENT, start, start + len(token)) >= 0:
                    return str(token)
                start = text.find(token, start + 1)
        return None

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


def _generation_eos(folder_or_id: str | Path, revision: str | None) -> Any:
    """Returns the EOS ids in the model's `generation_config.json`, else in its `config.json`."""
    from transformers import GenerationConfig, PreTrainedConfig

    try:
        return GenerationConfig.from_pretrained(folder_or_id, revision=revision or "main").eos_token_id
    except OSError:
        config, _ = PreTrainedConfig.get_config_dict(folder_or_id, revision=revision)
        return config.get("eos_token_id")


def _as_list(entry: int | list[int] | None) -> list[int]:
    if entry is None:
        return []
    return [entry] if isinstance(entry, int) else list(entry)
