"""Tools in the words of Anthropic's Messages API, and as chats have them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from gateway.strict_model import StrictModel


class AnthropicTool(StrictModel):
    """Other types than "custom" would run on the server, which has none."""

    type: Literal["custom"] | None = None
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    input_schema: dict[str, Any]


class ModeChoice(StrictModel):
    type: Literal["auto", "any", "none"]
    disable_parallel_tool_use: bool | None = None


class NamedChoice(StrictModel):
    type: Literal["tool"]
    name: str
    disable_parallel_tool_use: bool | None = None


def _choice_tag(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, Mapping) else None
    return "#named" if kind == "tool" else "#mode" if kind in ("auto", "any", "none") else None


AnthropicChoice = Annotated[
    Annotated[ModeChoice, Tag("#mode")] | Annotated[NamedChoice, Tag("#named")],
    Discriminator(
        _choice_tag,
        custom_error_type="unsupported_value",
        custom_error_message="must be an object of type auto, any, tool or none",
    ),
]


class ToolUseBlock(StrictModel):
    """A call that an earlier message has made."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]

    def chat_call(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": json.dumps(self.input, ensure_ascii=False)}
        return {"id": self.id, "type": "function", "function": function}


def chat_tools(tools: Sequence[AnthropicTool]) -> list[dict[str, Any]]:
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": tool.input_schema,
            },
        }
        for tool in tools
    ]


_MODES = {"auto": "auto", "any": "required", "none": "none"}


def chat_choice(choice: ModeChoice | NamedChoice) -> Any:
    if isinstance(choice, NamedChoice):
        return {"type": "function", "function": {"name": choice.name}}
    return _MODES[choice.type]
