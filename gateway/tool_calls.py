"""The tool calls of one choice, gathered from their deltas.  Knows no endpoint's way to show them."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from gateway.events import CallDelta
from protos.errors import ModelError


@dataclass
class ToolCall:
    id: str  # unlike that of any other call, of any answer
    name: str
    arguments: str = ""  # JSON, once the answer has ended


class ToolCalls:
    """What has come so far."""

    def __init__(self) -> None:
        self.calls: list[ToolCall] = []

    def add(self, delta: CallDelta) -> ToolCall:
        """The call that `delta` belongs to, with it.

        Raises:
            ModelError: calls do not come in order, each with its name first.
        """
        if delta.index == len(self.calls) and delta.name:
            self.calls.append(ToolCall(f"call_{secrets.token_hex(12)}", delta.name))
        elif delta.index >= len(self.calls) or delta.name:
            raise ModelError("the language model sent pieces of tool calls out of order")
        call = self.calls[delta.index]
        call.arguments += delta.arguments
        return call
