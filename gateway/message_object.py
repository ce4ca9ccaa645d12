"""The answer of `/v1/messages`, whole and as Anthropic's stream of events."""

from __future__ import annotations

from typing import Any

from gateway.errors import anthropic_error
from gateway.events import Delta, Event, Finished, Restarted, Started, Usage
from gateway.streaming import named_sse
from protos.errors import ModelError, ServingError

_BROKEN_OFF = "the language model ended an answer without finishing it"


class MessageObject:
    """Collects the events of one answer, and shows what there is of it."""

    def __init__(self, request_id: str, model: str) -> None:
        self._head = {"id": f"msg_{request_id}", "type": "message", "role": "assistant", "model": model}
        self._begin()

    def _begin(self) -> None:
        self._texts: list[str] = []
        self._finished: Finished | None = None
        self._usage: Usage | None = None

    def add(self, event: Event) -> None:
        if isinstance(event, Delta):
            self._texts.append(event.text)
        elif isinstance(event, Finished):
            self._finished = event
        elif isinstance(event, Usage):
            self._usage = event
        elif isinstance(event, Restarted):
            self._begin()

    def body(self) -> dict[str, Any]:
        """Raises ModelError when the answer broke off."""
        content = [{"type": "text", "text": "".join(self._texts)}]
        return {**self._head, "content": content, **self.stop(), "usage": self.usage()}

    def start(self, prompt_tokens: int) -> dict[str, Any]:
        """The message of which nothing has been said."""
        usage = {**_usage_json(Usage(prompt_tokens, 0))}
        return {**self._head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}

    def stop(self) -> dict[str, Any]:
        if self._finished is None or self._usage is None:
            raise ModelError(_BROKEN_OFF)
        if self._finished.reason == "length":
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        if self._finished.stop_string:
            return {"stop_reason": "stop_sequence", "stop_sequence": self._finished.stop_string}
        return {"stop_reason": "end_turn", "stop_sequence": None}

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


class MessageEncoder:
    """Events of one answer to Anthropic's; there is no [DONE]."""

    def __init__(self, message: MessageObject) -> None:
        self._message = message
        self._prompt_tokens = 0
        self._has_begun = False
        self.is_admitted = False

    def encode(self, event: Event) -> bytes:
        self._message.add(event)
        if isinstance(event, Started):
            self.is_admitted, self._prompt_tokens = True, event.prompt_tokens
        elif isinstance(event, Delta) and event.text:
            delta = {"type": "text_delta", "text": event.text}
            return self._begin() + named_sse("content_block_delta", {"index": 0, "delta": delta})
        elif isinstance(event, Finished):
            return self._begin() + named_sse("content_block_stop", {"index": 0})
        return b""

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
        start = named_sse("message_start", {"message": self._message.start(self._prompt_tokens)})
        block = {"type": "text", "text": ""}
        return start + named_sse("content_block_start", {"index": 0, "content_block": block})
