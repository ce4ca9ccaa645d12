"""Tools that a model may call: what a request says of them, and the grammar of a call that must come."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import Enum
from typing import Any

from llm_service.answer_parser import THINK_END, THINK_START
from llm_service.call_form import CallForm
from llm_service.response_format import FormatKind, ResponseFormat
from protos.errors import InvalidRequest

MAX_TOOLS = 128
MAX_TOOL_BYTES = 256 << 10  # of all descriptions and schemas
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class ToolChoice(Enum):
    AUTO = "auto"
    NONE = "none"
    REQUIRED = "required"
    NAMED = "named"


@dataclass(frozen=True)
class Tool:
    name: str
    description: str
    parameters: str  # a JSON Schema as JSON, "" for no parameters

    def definition(self) -> dict[str, Any]:
        """As the OpenAI API and chat templates have it."""
        function = {"name": self.name, "description": self.description, "parameters": self.schema()}
        return {"type": "function", "function": {k: v for k, v in function.items() if v or k == "parameters"}}

    def schema(self) -> dict[str, Any]:
        empty = {"type": "object", "properties": {}}
        schema = json.loads(self.parameters) if self.parameters else empty
        if not isinstance(schema, dict):
            raise ValueError
        return schema


@dataclass(frozen=True)
class ToolUse:
    """What a request says about tools, checked."""

    tools: tuple[Tool, ...]
    choice: ToolChoice = ToolChoice.AUTO
    name: str = ""
    single_call: bool = False
    allowed: tuple[str, ...] = ()  # with AUTO and REQUIRED: the only ones; empty: all

    def validate(self) -> None:
        """
        Raises:
            InvalidRequest: names the first wrong field.
        """
        if not self.tools or len(self.tools) > MAX_TOOLS:
            raise InvalidRequest(f"tools: 1 to {MAX_TOOLS} are allowed", field="tools.tools")
        size = sum(len(tool.description.encode()) + len(tool.parameters.encode()) for tool in self.tools)
        if size > MAX_TOOL_BYTES:
            problem = f"tools: {size} bytes, at most {MAX_TOOL_BYTES} are allowed"
            raise InvalidRequest(problem, field="tools.tools")
        for number, tool in enumerate(self.tools):
            _validate(tool, f"tools.tools[{number}]")
        names = [tool.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise InvalidRequest("two tools have the same name", field="tools.tools")
        if self.choice is ToolChoice.NAMED and self.name not in names:
            raise InvalidRequest("there is no tool of that name", field="tools.name")
        self._validate_allowed(names)

    def _validate_allowed(self, names: list[str]) -> None:
        if self.allowed and self.choice not in (ToolChoice.AUTO, ToolChoice.REQUIRED):
            problem = f"allowed: goes with auto and required, not with {self.choice.value}"
            raise InvalidRequest(problem, field="tools.allowed")
        for number, name in enumerate(self.allowed):
            if name not in names:
                raise InvalidRequest("there is no tool of that name", field=f"tools.allowed[{number}]")

    @property
    def shown(self) -> tuple[Tool, ...]:
        """The tools that the model is told of."""
        if self.choice is ToolChoice.NONE:
            return ()
        return tuple(tool for tool in self.tools if not self.allowed or tool.name in self.allowed)

    @property
    def _forced(self) -> tuple[Tool, ...]:
        """Those of which one must be called."""
        if self.choice is ToolChoice.REQUIRED:
            return self.shown
        return tuple(t for t in self.tools if self.choice is ToolChoice.NAMED and t.name == self.name)

    def refusal(self, problem: str) -> InvalidRequest:
        field = "tools.tools"
        if len(self._forced) == 1:
            field += f"[{self.tools.index(self._forced[0])}].parameters"
        return InvalidRequest(f"the schema of a tool that must be called {problem}", field=field)

    def rule(self, may_think: bool, form: CallForm) -> str:
        """Grammar rules of an answer that must call; "" where it need not."""
        called = self._forced
        if not called:
            return ""
        more = "" if self.single_call or self.choice is ToolChoice.NAMED else _more_calls(form)
        calls = " | ".join(f"call_{number}" for number in range(len(called)))
        rules = [f"{thinking(may_think)}call{more}", f"call: {calls}"]
        for number, tool in enumerate(called):
            head, tail = _around_arguments(form, tool.name)
            rules.append(f"call_{number}: {head} arguments_{number} {tail}")
            rules.append(f"arguments_{number}: {self._arguments_rule(tool)}")
        return "\n".join(rules) + ("\n" + _THOUGHT if may_think else "")

    def _arguments_rule(self, tool: Tool) -> str:
        schema = json.dumps({"type": "object"} | tool.schema())
        try:
            return ResponseFormat(FormatKind.JSON_SCHEMA, schema).rule()
        except InvalidRequest:  # which names the field of a format
            field = f"tools.tools[{self.tools.index(tool)}].parameters"
            raise InvalidRequest("parameters: no JSON Schema that can be enforced", field=field) from None


def _more_calls(form: CallForm) -> str:
    return f" ({json.dumps(form.between_calls)} call)*" if form.between_calls else " call*"


def _around_arguments(form: CallForm, name: str) -> tuple[str, str]:
    """Special tokens stand in a grammar by their names, without quotes."""
    if not form.tokens:
        return json.dumps(form.start + form.head(name)), json.dumps(form.tail + form.end)
    *start, end = form.tokens
    return f"{' '.join(start)} {json.dumps(form.head(name))}", f"{json.dumps(form.tail)} {end}"


_THOUGHT = f"""thought: "{THINK_START}" inner /\\n{{0,2}}/
inner[suffix="{THINK_END}"]: /(?s:.*)/"""


def thinking(may_think: bool) -> str:
    return "thought? " if may_think else ""


def with_thought(rule: str, may_think: bool) -> str:
    """The rule of an answer behind what the model thinks."""
    return f"{thinking(True)}formatted\nformatted: {rule}\n{_THOUGHT}" if may_think else rule


def _validate(tool: Tool, field: str) -> None:
    if not _NAME.fullmatch(tool.name):
        problem = "a tool's name must be 1 to 64 letters, digits, '_' or '-'"
        raise InvalidRequest(problem, field=f"{field}.name")
    try:
        tool.schema()
    except (ValueError, RecursionError):
        raise InvalidRequest("parameters: not a JSON object", field=f"{field}.parameters") from None
