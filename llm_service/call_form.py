"""How a family of models spells tools and their calls; which one it is, the tokenizer tells.

Knows neither tokens' ids nor whole prompts.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CallForm:
    """A call is `start`, an object of its name and arguments, `end`."""

    start: str
    end: str
    arguments_key: str
    break_before_end: str
    between_calls: str
    tokens: tuple[str, ...] = ()  # special tokens that the markers are made of, in order; none: plain text
    tools_role: str = ""  # of a turn that names the tools; "": the system message does, in words
    answer_role: str = ""  # of a turn with a tool's answer; "": the user's

    def head(self, name: str) -> str:
        """What comes between `start` and a call's arguments."""
        return f'\n{{"name": {json.dumps(name, ensure_ascii=False)}, "{self.arguments_key}": '

    @property
    def tail(self) -> str:
        """What comes between a call's arguments and `end`."""
        return "}" + self.break_before_end

    def call_text(self, name: str, arguments: str) -> str:
        """A call in the history, as the model writes one."""
        return f"{self.start}{self.head(name)}{arguments or '{}'}{self.tail}{self.end}"

    def answer_text(self, text: str) -> str:
        """A tool's answer in the history."""
        return text if self.answer_role else f"<tool_response>\n{text}\n</tool_response>"

    def tools_text(self, definitions: Sequence[dict[str, Any]]) -> str:
        """What a prompt says of tools, given as the OpenAI API has them."""
        if self.tools_role:
            return json.dumps([tool["function"] for tool in definitions], ensure_ascii=False)
        lines = ("\n" + json.dumps(tool, ensure_ascii=False) for tool in definitions)
        return _HEAD + "".join(lines) + _TAIL


# Hermes' and Qwen's wording: what Qwen2.5 and Qwen3, and so InternVL3 and 3.5, were trained on.
HERMES = CallForm("<tool_call>", "</tool_call>", "arguments", break_before_end="\n", between_calls="\n")
_HEAD = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)

# InternLM2's and 2.5's: https://github.com/InternLM/InternLM/blob/main/chat/chat_format.md.
INTERNLM = CallForm(
    "<|action_start|><|plugin|>",
    "<|action_end|>",
    "parameters",
    break_before_end="",
    between_calls="",
    tokens=("<|action_start|>", "<|plugin|>", "<|action_end|>"),
    tools_role="system name=<|plugin|>",
    answer_role="environment name=<|plugin|>",
)


def find_call_form(special_tokens: Collection[str]) -> CallForm:
    """The form that a tokenizer was made for."""
    return INTERNLM if all(token in special_tokens for token in INTERNLM.tokens) else HERMES
