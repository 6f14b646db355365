"""The model's tokenizer and chat template."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from shared.errors import ConfigurationError, InvalidRequest
from shared.messages import NO_INPUTS, TemplateInputs
from worker.engine.detokenizer import Detokenizer

DEVELOPER = "developer"


class Tokenizer:
    """Turns messages into token ids, and token ids into text. Methods may be called from any thread."""

    def __init__(self, backend: Any, eos_token_ids: frozenset[int]) -> None:
        """Wraps `backend`, a transformers tokenizer with a chat template."""
        self._backend = backend
        self._fast = getattr(backend, "backend_tokenizer", None)
        self.eos_token_ids = eos_token_ids
        """Ids of the tokens that end a sequence, from the tokenizer and the model's generation config."""
        self.special_tokens: Mapping[int, str] = {
            token_id: token.content
            for token_id, token in backend.added_tokens_decoder.items()
            if token.special
        }
        """The text of each special token by its id; `decode` skips these tokens."""
        self._silent: dict[int, bool] = {}

    @classmethod
    def load(
        cls, folder_or_id: str | Path, revision: str | None = None, trust_remote_code: bool = False
    ) -> Self:
        """Loads the tokenizer of a model folder or Hugging Face id.

        Raises:
            ConfigurationError: there is no tokenizer, or it has no chat template.
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
        return cls(backend, frozenset(token_id for entry in declared for token_id in _as_list(entry)))

    def encode_chat(self, messages: list[dict[str, Any]], inputs: TemplateInputs = NO_INPUTS) -> list[int]:
        """Returns the token ids of a chat: messages in the model's template, up to the assistant's turn.

        If `inputs` continues the last message, the ids end inside of it. Special tokens, including BOS, come
        only from the template; the tokenizer adds none.

        Raises:
            InvalidRequest: the template refuses the messages.
        """

        if DEVELOPER not in str(self._backend.chat_template):
            # Most templates would refuse the role `developer`, which is the newer name of `system`.
            messages = [
                message | {"role": "system"} if message.get("role") == DEVELOPER else message
                for message in messages
            ]
        try:
            encoded = self._backend.apply_chat_template(
                messages,
                tools=inputs.tools or None,
                add_generation_prompt=not inputs.continue_final_message,
                continue_final_message=inputs.continue_final_message,
                tokenize=True,
                return_dict=True,
                **inputs.variables,
            )
        # A template is a program and may raise any exception; only this request must fail.
        except Exception as error:
            raise InvalidRequest(
                f"The model's chat template refuses these messages: {error}", param="messages"
            ) from error
        return list(encoded["input_ids"])

    def encode_text(self, text: str) -> list[int]:
        """Returns the token ids of a text, with the special tokens that the tokenizer adds to every text.

        Raises:
            InvalidRequest: the text can't be tokenized.
        """
        try:
            return list(self._backend(text)["input_ids"])
        # Tokenizers raise errors of many kinds, e.g. for half a surrogate pair.
        except Exception as error:
            raise InvalidRequest(f"The prompt can't be tokenized: {error}", param="prompt") from error

    def decode(self, token_ids: Sequence[int]) -> str:
        """Returns the text of `token_ids` without special tokens."""
        if self._fast is not None:
            return str(self._fast.decode(list(token_ids), skip_special_tokens=True))
        return str(
            self._backend.decode(
                list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
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
    """Returns the EOS ids in the model's `generation_config.json`, or in `config.json` if that is missing."""
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
