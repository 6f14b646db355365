"""Renders chat templates so that marks in the result tell which of its characters a client wrote.

A template runs in the same sandbox as in transformers, with the same filters, functions and extensions. A
template can change a string only by operators, methods, filters and its output, and this module handles all
of these. If the effect of an operation on the marks is not known, its whole result counts as the client's.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.filters import make_attrgetter
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from worker.model.marked_text import MarkedText, is_marked, join, keep_marks, mark, mask_of

_OWN_STRING_METHODS = ("join", "replace")


class LimitExceeded(Exception):
    """A template takes too long, or too much memory."""


class NotNow(LimitExceeded):
    """A template can't be run at the moment, whatever chat it is given."""


class Rendered(NamedTuple):
    """A rendered chat."""

    text: str
    mask: bytes
    """One byte per character of the text: 1 if a client wrote it, 0 if the template did."""


@functools.lru_cache(maxsize=256)
def compile_template(source: str) -> Any:
    """Compiles a chat template; raises jinja2's errors if the template has a wrong syntax."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    theirs = _compile_jinja_template(source).environment
    environment = _MarkingEnvironment(
        trim_blocks=theirs.trim_blocks,
        lstrip_blocks=theirs.lstrip_blocks,
        extensions=[type(extension) for extension in theirs.extensions.values()],
        finalize=_finalize,
    )
    environment.filters = {name: _marking(function) for name, function in theirs.filters.items()}
    environment.filters["join"] = functools.partial(_join, environment)
    environment.filters["format"] = _format
    environment.globals.update(theirs.globals)
    return environment.from_string(source)


def render(source: str, own: Mapping[str, Any], client: Mapping[str, Any]) -> Rendered:
    """Renders a chat template. A template is a program, so it may raise any exception.

    `own`: variables whose text counts as the template's. `client`: variables whose text a client wrote.
    """
    text = compile_template(source).render({**{name: mark(value) for name, value in client.items()}, **own})
    return Rendered(str.__add__("", text), mask_of(text))


class _MarkingGenerator(CodeGenerator):
    """Compiles the operator `~` and the output of a template so that both keep marks."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802
        self.write("environment.concat_marked((")
        for item in node.nodes:
            self.visit(item, frame)
            self.write(", ")
        self.write("))")

    def _output_child_pre(self, node: nodes.Expr, frame: Frame, finalize: Any) -> None:
        # Without this, the block `autoescape` would replace marked text by HTML.
        self.write(f"str({finalize.src}")


class _MarkingEnvironment(ImmutableSandboxedEnvironment):
    code_generator_class = _MarkingGenerator
    concat = staticmethod(join)
    intercepted_binops = frozenset("%")

    @staticmethod
    def concat_marked(values: tuple[Any, ...]) -> str:
        """Joins the operands of the operator `~`."""
        return join(map(_finalize, values))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Calls a function, a macro or a method, and marks the result."""
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if type(owner) is str and name in _OWN_STRING_METHODS:
            __obj = getattr(MarkedText(owner, mask_of(owner)), name)
        return _mark_result(super().call, (__context, __obj, *args), kwargs, owner, __obj)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Returns a function that does the same as `str.format`, but in the sandbox and with marks."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None or isinstance(value.__self__, MarkedText):
            return wrapped
        return functools.partial(
            keep_marks, lambda _, *args, **kwargs: wrapped(*args, **kwargs), value.__self__
        )

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Applies the operator `%`, which formats `left` if it is a string."""
        operation = self.binop_table[operator]
        if type(left) is str and is_marked(right):
            return keep_marks(operation, left, right)
        return _mark_plain(operation(left, right), (left, right))


def _mark_result(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], owner: Any, called: Any
) -> Any:
    result = function(*args, **kwargs)
    # The body of a macro is compiled, too, and has marked what it returns.
    return result if isinstance(called, Macro) else _mark_plain(result, (owner, *args[1:], kwargs))


def _marking(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a filter: its result counts as the client's if an argument contains text of the client."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return _mark_plain(function(*args, **kwargs), (*args, kwargs))

    return wrapper


def _mark_plain(result: Any, sources: Any) -> Any:
    """Marks a result, a plain string or a list of them, as the client's if any of its `sources` is marked."""
    if isinstance(result, str):
        is_plain = not isinstance(result, MarkedText)
        return MarkedText(str.__add__("", result)) if is_plain and is_marked(sources) else result
    if isinstance(result, list) and any(type(item) is str for item in result) and is_marked(sources):
        return [MarkedText(item) if type(item) is str else item for item in result]
    return result


def _finalize(value: Any) -> str:
    """Turns a value into the text that a template outputs for it."""
    if isinstance(value, str):
        return value
    return _mark_plain(str(value), value)  # type: ignore[no-any-return]


def _join(environment: Any, value: Any, d: str = "", attribute: str | int | None = None) -> str:
    """Does the same as jinja2's filter `join`."""
    items = value if attribute is None else map(make_attrgetter(environment, attribute), value)
    return join(map(_finalize, items), _finalize(d))


def _format(value: str, *args: Any, **kwargs: Any) -> Any:
    """Does the same as jinja2's filter `format`."""
    return keep_marks(
        lambda text, *args, **kwargs: text % (kwargs or args), _finalize(value), *args, **kwargs
    )
