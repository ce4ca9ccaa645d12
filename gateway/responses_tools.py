"""Tools in the words of `/v1/responses`, where nothing is nested below `function`, and as chats have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from gateway.strict_model import StrictModel, text_or_list
from gateway.tool_schema import CHOICE_ERROR, MAX_TOOLS, CalledFunction, CalledTool, Function, choice_tag


class _FunctionType(StrictModel):
    type: Literal["function"]


# In this order of bases the type is checked first: of another tool, nothing else would be understood.
class FunctionTool(Function, _FunctionType):
    """Other tools would run on the server, which has none."""


class NamedFunction(_FunctionType):
    name: str


class AllowedFunctions(StrictModel):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedFunction], Field(min_length=1, max_length=MAX_TOOLS)]


FunctionChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("#mode")]
    | Annotated[NamedFunction, Tag("#function")]
    | Annotated[AllowedFunctions, Tag("#allowed_tools")],
    Discriminator(choice_tag, **CHOICE_ERROR),
]


class FunctionCallItem(StrictModel):
    """A call that an earlier response has made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str

    @property
    def call(self) -> CalledTool:
        function = CalledFunction(name=self.name, arguments=self.arguments)
        return CalledTool(id=self.call_id, function=function)


class FunctionOutputItem(StrictModel):
    """What the caller's function has answered."""

    type: Literal["function_call_output"]
    call_id: str
    output: Annotated[
        Annotated[str, Tag("#string")] | Annotated[list[dict[str, Any]], Tag("#list")],
        Discriminator(
            text_or_list,
            custom_error_type="content_type",
            custom_error_message="must be a string or an array of content parts",
        ),
    ]


def chat_tools(tools: Sequence[FunctionTool]) -> list[dict[str, Any]]:
    return [{"type": "function", "function": tool.model_dump(exclude={"type"})} for tool in tools]


def chat_choice(choice: str | NamedFunction | AllowedFunctions | None) -> Any:
    if isinstance(choice, NamedFunction):
        return _named(choice)
    if isinstance(choice, AllowedFunctions):
        allowed = {"mode": choice.mode, "tools": [_named(tool) for tool in choice.tools]}
        return {"type": "allowed_tools", "allowed_tools": allowed}
    return choice


def _named(function: NamedFunction) -> dict[str, Any]:
    return {"type": "function", "function": {"name": function.name}}
