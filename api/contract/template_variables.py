"""Variables that a client sets for the chat template: which names and values are allowed."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator

from api.contract.strict import invalid, unsupported

MAX_NUM_VARIABLES = 32
MAX_NUM_CHARS = 4_096
"""Maximum length of a variable's text."""
NAME = re.compile("[A-Za-z_][A-Za-z0-9_]{0,63}")
RESERVED = frozenset(
    (
        *(
            "add_generation_prompt",
            "chat_template",
            "continue_final_message",
            "conversation",
            "conversations",
        ),
        *("documents", "kwargs", "max_length", "messages", "padding", "return_assistant_tokens_mask"),
        *("return_dict", "return_tensors", "sanitize_control_tokens", "self", "tokenize", "tokenizer_kwargs"),
        *("tools", "truncation"),
        *("additional_special_tokens", "extra_special_tokens", "special_tokens_map", "tokenizer"),
        *("cycler", "dict", "joiner", "lipsum", "loop", "namespace", "raise_exception", "range"),
        "strftime_now",
    )
)
"""Names that `apply_chat_template`, the tokenizer or Jinja uses; also reserved: all that end in `_token`."""


def check_variables(variables: Any) -> Any:
    """Returns the variables. Raises an error that names the first variable with a wrong name or value."""
    if len(variables) > MAX_NUM_VARIABLES:
        raise invalid(f"at most {MAX_NUM_VARIABLES} variables can be set")
    for name, value in variables.items():
        if not NAME.fullmatch(name):
            raise invalid("a name has up to 64 letters, digits and underscores", field=name)
        if name in RESERVED or name.endswith("_token"):
            raise invalid("the name is reserved by the tokenizer", field=name)
        _check_value(name, value)
    return variables


def _check_value(name: str, value: Any) -> None:
    if isinstance(value, list | dict):
        raise unsupported("only a string, a number, true, false or null is served here", field=name)
    if isinstance(value, str) and len(value) > MAX_NUM_CHARS:
        raise invalid(f"a text has at most {MAX_NUM_CHARS} characters", field=name)
    if value in (float("inf"), float("-inf")):
        raise invalid("the number is too large", field=name)


TemplateVariables = Annotated[dict[str, Any], AfterValidator(check_variables)]
