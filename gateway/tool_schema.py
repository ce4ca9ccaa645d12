"""Fields of a request that offer tools, and of messages that have called them; none of protobuf's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from gateway.json_size import BOUNDED
from gateway.strict_model import StrictModel

MAX_TOOLS = 128


class Function(StrictModel):
    """`strict` changes nothing: the arguments of a call that must come always fulfil their schema."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(StrictModel):
    """What the model may ask the client to run."""

    type: Literal["function"] = "function"
    function: Function


class FunctionName(StrictModel):
    name: str


class NamedTool(StrictModel):
    """As a choice: this one must be called."""

    type: Literal["function"] = "function"
    function: FunctionName


class AllowedTools(StrictModel):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedToolsChoice(StrictModel):
    """The model is told of these alone."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def choice_tag(value: Any) -> str | None:
    if isinstance(value, str):
        return "#mode"
    kind = value.get("type") if isinstance(value, Mapping) else None
    return f"#{kind}" if kind in ("function", "allowed_tools") else None


CHOICE_ERROR = {
    "custom_error_type": "unsupported_value",
    "custom_error_message": "must be 'none', 'auto', 'required', or of type function or allowed_tools",
}
ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("#mode")]
    | Annotated[NamedTool, Tag("#function")]
    | Annotated[AllowedToolsChoice, Tag("#allowed_tools")],
    Discriminator(choice_tag, **CHOICE_ERROR),
]


class ToolFields(StrictModel):
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS), BOUNDED] | None = None  # []: as if left out
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None


class CalledFunction(StrictModel):
    name: str
    arguments: str = ""


class CalledTool(StrictModel):
    """A call in an assistant's message."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
