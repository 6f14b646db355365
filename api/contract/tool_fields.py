"""The fields of a chat completion that describe tools and say which of them the model may call."""

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from api.contract.chat_tools import FunctionDefinition, FunctionName, FunctionType, Tool
from api.contract.strict import BOUNDED, StrictModel, invalid
from shared.messages import ToolChoice

MAX_NUM_TOOLS = 128


class NamedFunction(StrictModel):
    """The name of a function."""

    name: FunctionName
    """The function's name."""


class NamedTool(StrictModel):
    """A tool that the model must, or may, call."""

    type: FunctionType
    """`function`; other types are not served."""
    function: NamedFunction
    """The function."""


class AllowedTools(StrictModel):
    """The tools that the model may call; the template describes all tools to it."""

    mode: Literal["auto", "required"]
    """`auto` lets the model decide whether it calls a tool; `required` demands one or more calls."""
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_NUM_TOOLS), BOUNDED]
    """The tools that may be called."""


class AllowedToolsChoice(StrictModel):
    """A choice of tools by a list."""

    type: Literal["allowed_tools"]
    """`allowed_tools`."""
    allowed_tools: AllowedTools
    """The tools, and whether one must be called."""


def _kind(choice: Any) -> str:
    """Returns the tag of the model that checks a choice, so that an error names the field that is wrong."""
    if not isinstance(choice, dict):
        return "word"
    return "list" if choice.get("type") == "allowed_tools" else "tool"


Choice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("word")]
    | Annotated[NamedTool, Tag("tool")]
    | Annotated[AllowedToolsChoice, Tag("list")],
    Discriminator(_kind),
]
LegacyChoice = Annotated[
    Annotated[Literal["none", "auto"], Tag("word")] | Annotated[NamedFunction, Tag("tool")],
    Discriminator(_kind),
]


class ToolFields(StrictModel):
    """Tools, and which of them the model may call."""

    tools: Annotated[list[Tool], Field(max_length=MAX_NUM_TOOLS), BOUNDED] | None = None
    """Functions that the model may call."""
    tool_choice: Choice | None = None
    """`none`, `auto` (the default), `required`, the tool to call, or the tools that may be called."""
    parallel_tool_calls: bool | None = None
    """False: at most one call in an answer. Default: true."""
    functions: Annotated[list[FunctionDefinition], Field(max_length=MAX_NUM_TOOLS), BOUNDED] | None = None
    """Older form of `tools`; the answer then has `function_call`."""
    function_call: LegacyChoice | None = None
    """Older form of `tool_choice`: `none`, `auto` (the default), or the function to call."""

    @model_validator(mode="after")
    def _choice_fits_the_tools(self) -> Self:
        if self.tools and self.functions:
            raise invalid("'tools' are given already", field="functions")
        if self.functions and self.tool_choice is not None:
            raise invalid("use 'function_call' together with 'functions'", field="tool_choice")
        if self.tools and self.function_call is not None:
            raise invalid("use 'tool_choice' together with 'tools'", field="function_call")
        field = "function_call" if self.function_call is not None else "tool_choice"
        choice = self._chosen()
        if choice is None or not (choice.is_required or choice.names):
            return self
        if not self.described:
            raise invalid("only allowed together with tools", field=field)
        known = {tool["function"]["name"] for tool in self.described}
        for name in choice.names:
            if name not in known:
                raise invalid(f"there is no tool with the name '{name}'", field=field)
        return self

    @property
    def described(self) -> list[dict[str, Any]]:
        """The tools as the chat template gets them."""
        tools = [tool.function.to_template() for tool in self.tools or ()]
        return tools + [function.to_template() for function in self.functions or ()]

    def to_tool_choice(self) -> ToolChoice | None:
        """Returns which tools the model may call; None if it may call none."""
        return self._chosen() if self.tools or self.functions else None

    def _chosen(self) -> ToolChoice | None:
        chosen = self.function_call if self.functions or self.tool_choice is None else self.tool_choice
        is_legacy = bool(self.functions)
        is_single = is_legacy or self.parallel_tool_calls is False
        if chosen == "none":
            return None
        if isinstance(chosen, NamedFunction):
            return ToolChoice(True, (chosen.name,), True, is_legacy)
        if isinstance(chosen, NamedTool):
            return ToolChoice(True, (chosen.function.name,), is_single, is_legacy)
        if isinstance(chosen, AllowedToolsChoice):
            allowed = chosen.allowed_tools
            names = tuple(tool.function.name for tool in allowed.tools)
            return ToolChoice(allowed.mode == "required", names, is_single)
        return ToolChoice(chosen == "required", (), is_single, is_legacy)
