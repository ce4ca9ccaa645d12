"""The answer of `/v1/messages`, whole and as Anthropic's stream of events."""

from __future__ import annotations

import json
from typing import Any

from gateway.answer_items import AnswerSoFar, Closed, Grew, Item, Opened, Step
from gateway.errors import anthropic_error
from gateway.events import Event, Started, Usage
from gateway.streaming import named_sse
from protos.errors import ServingError

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessageObject:
    """Collects the events of one answer, and shows what there is of it."""

    def __init__(self, request_id: str, model: str) -> None:
        self._head = {"id": f"msg_{request_id}", "type": "message", "role": "assistant", "model": model}
        self._answer = AnswerSoFar()

    def add(self, event: Event) -> list[Step]:
        """What has changed of the content."""
        return self._answer.add(event)

    def body(self) -> dict[str, Any]:
        """Raises AnswerBrokeOff."""
        content = [_whole_block(item) for item in self._answer.items]
        return {**self._head, "content": content, **self.stop(), "usage": self.usage()}

    def start(self, prompt_tokens: int) -> dict[str, Any]:
        """The message of which nothing has been said."""
        usage = _usage_json(Usage(prompt_tokens, 0))
        return {**self._head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}

    def stop(self) -> dict[str, Any]:
        """How it ended.  Raises AnswerBrokeOff, and so does `usage`."""
        finished, _ = self._answer.end()
        if finished.reason == "stop" and finished.stop_string:
            return {"stop_reason": "stop_sequence", "stop_sequence": finished.stop_string}
        return {"stop_reason": _STOP_REASONS[finished.reason], "stop_sequence": None}

    def usage(self) -> dict[str, Any]:
        _, usage = self._answer.end()
        return _usage_json(usage)


def _usage_json(usage: Usage) -> dict[str, Any]:
    """Anthropic's input tokens are those that no cache held."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


def _block(item: Item) -> dict[str, Any]:
    """As it begins.  Reasoning has no signature: this server takes back none."""
    if item.call is not None:
        return {"type": "tool_use", "id": item.call.id, "name": item.call.name, "input": {}}
    if item.kind == "reasoning":
        return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "text", "text": ""}


def _whole_block(item: Item) -> dict[str, Any]:
    block = _block(item)
    if item.call is not None:
        return {**block, "input": _input(item.call.arguments)}
    return {**block, "thinking" if item.kind == "reasoning" else "text": item.text}


def _input(arguments: str) -> dict[str, Any]:
    """Empty where the call is not an object: it was cut short, or nothing held the model to its schema."""
    try:
        value = json.loads(arguments)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _block_delta(step: Grew) -> dict[str, Any]:
    if step.item.kind == "call":
        return {"type": "input_json_delta", "partial_json": step.piece}
    if step.item.kind == "reasoning":
        return {"type": "thinking_delta", "thinking": step.piece}
    return {"type": "text_delta", "text": step.piece}


class MessageEncoder:
    """Events of one answer to Anthropic's; there is no [DONE]."""

    def __init__(self, message: MessageObject) -> None:
        self._message = message
        self._prompt_tokens = 0
        self._has_begun = False
        self.is_admitted = False

    def encode(self, event: Event) -> bytes:
        steps = self._message.add(event)
        if isinstance(event, Started):
            self.is_admitted, self._prompt_tokens = True, event.prompt_tokens
        return self._begin() + b"".join(map(self._step, steps)) if steps else b""

    def keepalive(self) -> bytes:
        return self._begin() + named_sse("ping", {})

    def end(self) -> bytes:
        end = {"delta": self._message.stop(), "usage": self._message.usage()}
        return named_sse("message_delta", end) + named_sse("message_stop", {})

    def failure(self, error: ServingError) -> bytes:
        return named_sse("error", {"error": anthropic_error(error)["error"]})

    def _begin(self) -> bytes:
        if self._has_begun:
            return b""
        self._has_begun = True
        return named_sse("message_start", {"message": self._message.start(self._prompt_tokens)})

    def _step(self, step: Step) -> bytes:
        place = {"index": step.item.index}
        if isinstance(step, Opened):
            return named_sse("content_block_start", {**place, "content_block": _block(step.item)})
        if isinstance(step, Closed):
            return named_sse("content_block_stop", place)
        if not step.piece:  # log-probabilities alone, which this API does not show
            return b""
        return named_sse("content_block_delta", {**place, "delta": _block_delta(step)})
