"""The answer of `/v1/messages`, whole and as Anthropic's stream of events."""

from __future__ import annotations

import json
from typing import Any

from gateway.answer_items import AnswerItems, Closed, Grew, Item, Opened, Step
from gateway.errors import anthropic_error
from gateway.events import Delta, Event, Finished, Restarted, Started, Usage
from gateway.streaming import named_sse
from protos.errors import ModelError, ServingError

_BROKEN_OFF = "the language model ended an answer without finishing it"
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessageObject:
    """Collects the events of one answer, and shows what there is of it."""

    def __init__(self, request_id: str, model: str) -> None:
        self._head = {"id": f"msg_{request_id}", "type": "message", "role": "assistant", "model": model}
        self._begin()

    def _begin(self) -> None:
        self._items = AnswerItems()
        self._finished: Finished | None = None
        self._usage: Usage | None = None

    def add(self, event: Event) -> list[Step]:
        """What has changed of the content."""
        if isinstance(event, Delta):
            return self._items.add(event)
        if isinstance(event, Finished):
            self._finished = event
            return self._items.finish()
        if isinstance(event, Usage):
            self._usage = event
        elif isinstance(event, Restarted):
            self._begin()
        return []

    def body(self) -> dict[str, Any]:
        """Raises ModelError when the answer broke off."""
        content = [_whole_block(item) for item in self._items.items]
        return {**self._head, "content": content, **self.stop(), "usage": self.usage()}

    def start(self, prompt_tokens: int) -> dict[str, Any]:
        """The message of which nothing has been said."""
        usage = {**_usage_json(Usage(prompt_tokens, 0))}
        return {**self._head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}

    def stop(self) -> dict[str, Any]:
        if self._finished is None or self._usage is None:
            raise ModelError(_BROKEN_OFF)
        if self._finished.reason == "stop" and self._finished.stop_string:
            return {"stop_reason": "stop_sequence", "stop_sequence": self._finished.stop_string}
        return {"stop_reason": _STOP_REASONS[self._finished.reason], "stop_sequence": None}

    def usage(self) -> dict[str, Any]:
        if self._usage is None:
            raise ModelError(_BROKEN_OFF)
        return _usage_json(self._usage)


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
