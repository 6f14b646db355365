"""Turns the form that a client asked for into a grammar, and checks it before the enqueue."""

import asyncio
import hashlib
import json
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import msgspec
from llguidance import LLMatcher, grammar_from

from api.contract.form_fields import Form, as_schema
from shared.errors import InvalidRequest
from shared.grammars import MAX_GRAMMAR_BYTES, fault_of, reason_in
from shared.messages import GenerationRequest
from shared.settings import ApiSettings

if TYPE_CHECKING:  # only the stub has this type
    from llguidance._lib import JsonCompileOptions

LARGE_GRAMMAR_BYTES = 8 * 1024
MAX_NUM_CHECKED = 1_000
MAX_GBNF_LENGTH = 8 * 1024


class GrammarChecker:
    """Builds and checks the grammars of one API process, in threads beside its event loop."""

    def __init__(self, settings: ApiSettings) -> None:
        self._is_flexible = settings.json_whitespace == "flexible"
        self._checked: OrderedDict[bytes, str | None] = OrderedDict()
        """The fault of each grammar that was checked last, by the grammar's hash; None for a good one."""
        # A large grammar may take a second of a core. So only one is checked at a time, beside a small one.
        self._large, self._small = asyncio.Semaphore(1), asyncio.Semaphore(1)

    async def bind(self, request: GenerationRequest, form: Form | None) -> GenerationRequest:
        """Returns the request with the grammar of `form`; without a form, returns the request unchanged.

        Raises:
            InvalidRequest: the form can't be enforced; see `build`.
        """
        if form is None:
            return request
        sampling = msgspec.structs.replace(request.sampling, grammar=await self.build(form))
        return msgspec.structs.replace(request, sampling=sampling)

    async def check_tools(self, tools: list[dict[str, Any]]) -> None:
        """Checks that a model can be forced to call these tools with arguments that fit their schemas.

        Raises:
            InvalidRequest: a schema can't be enforced; the message names its tool and the reason.
        """
        for number, tool in enumerate(tools):
            if schema := tool["function"].get("parameters"):
                await self.build(Form("json_schema", schema, f"tools[{number}].function.parameters"))

    async def build(self, form: Form) -> str:
        """Returns the grammar of a form, in the format that workers expect.

        Raises:
            InvalidRequest: the form can't be enforced; the message names the field and the reason.
        """
        try:
            grammar = await asyncio.to_thread(self._serialize, form)
        # llguidance raises only ValueErrors, and its converter of GBNF also RecursionErrors.
        except (ValueError, RecursionError) as error:
            raise _refusal(form, reason_in(str(error))) from None
        if len(grammar) > MAX_GRAMMAR_BYTES:
            raise _refusal(form, f"larger than {MAX_GRAMMAR_BYTES} bytes")
        key = hashlib.sha256(grammar.encode()).digest()
        if key not in self._checked:
            async with self._large if len(grammar) > LARGE_GRAMMAR_BYTES else self._small:
                self._checked[key] = await asyncio.to_thread(fault_of, grammar)
            while len(self._checked) > MAX_NUM_CHECKED:
                self._checked.popitem(last=False)
        if fault := self._checked[key]:
            raise _refusal(form, fault)
        return grammar

    def _serialize(self, form: Form) -> str:
        """Converts a form to llguidance's format.

        Raises:
            ValueError: the form is too large, or has a wrong syntax.
        """
        if form.kind == "json_schema":
            schema = as_schema(form.value)
            _check_size(schema)
            # Nothing that the schema demands may be ignored, even if the schema itself allows it.
            exact: JsonCompileOptions = {"lenient": False, "coerce_one_of": False}
            if form.whitespace:
                exact["whitespace_flexible"], exact["whitespace_pattern"] = True, form.whitespace
            elif form.whitespace is not None:
                exact["whitespace_flexible"], exact["whitespace_pattern"] = False, None
            defaults: JsonCompileOptions = {"whitespace_flexible": self._is_flexible}
            return LLMatcher.grammar_from_json_schema(schema, defaults=defaults, overrides=exact)
        if form.kind == "choice":
            _check_size("".join(form.value))
            words = " | ".join(json.dumps(word, ensure_ascii=False) for word in form.value)
            return LLMatcher.grammar_from_lark(f"start: {words}")
        _check_size(form.value)
        if form.kind == "regex":
            return LLMatcher.grammar_from_regex(form.value)
        # The converter of GBNF takes quadratic time for blank lines, and stops all other threads meanwhile.
        text = "\n".join(line for line in form.value.splitlines() if line.strip())
        if "::=" in text and len(text) > MAX_GBNF_LENGTH:
            raise ValueError(f"a grammar in GBNF may have {MAX_GBNF_LENGTH} characters; use Lark")
        return grammar_from("grammar", text)


def _check_size(text: str) -> None:
    # A text of surrogates without partners, which JSON can express, raises a ValueError.
    if len(text.encode()) > MAX_GRAMMAR_BYTES:
        raise ValueError(f"larger than {MAX_GRAMMAR_BYTES} bytes")


def _refusal(form: Form, reason: str) -> InvalidRequest:
    return InvalidRequest(f"Invalid value for '{form.field}': {reason}.", param=form.field)
