"""The body of a chat completion, whole.  Chunks of streams share its pieces."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gateway.choices import Choices
from gateway.events import Delta, Event, TokenLogprob, Usage
from gateway.tool_calls import ToolCall, ToolCalls

MIN_LOGPROB = -9999.0  # JSON has no -inf


@dataclass(frozen=True)
class Reply:
    """What all parts of one answer repeat."""

    id: str
    created: int  # Unix time, seconds
    model: str
    num_choices: int
    logprobs: bool = False
    service_tier: str | None = None  # said only when the request asked for one
    reasoning_keys: tuple[str, ...] = ("reasoning_content",)  # what the model thinks is said under each

    def reasoning(self, text: str) -> dict[str, str]:
        return dict.fromkeys(self.reasoning_keys, text)


@dataclass
class _Choice:
    texts: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: ToolCalls = field(default_factory=ToolCalls)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, delta: Delta) -> None:
        self.texts.append(delta.text)
        self.logprobs.extend(logprobs_json(delta.logprobs))
        if delta.reasoning:
            self.reasoning.append(delta.reasoning)
        for call in delta.calls:
            self.calls.add(call)

    def message(self, reply: Reply) -> dict[str, Any]:
        """Calls without a text have no content; what a model did not do has no key."""
        text, calls = "".join(self.texts), self.calls.calls
        message: dict[str, Any] = {
            "role": "assistant",
            "content": text if text or not calls else None,
            "refusal": None,
        }
        if self.reasoning:
            message |= reply.reasoning("".join(self.reasoning))
        if calls:
            message["tool_calls"] = [_call_json(call) for call in calls]
        return message


class Completion:
    """Collects the events of one answer."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._choices = Choices(reply.num_choices, _Choice)

    def add(self, event: Event) -> None:
        self._choices.add(event)

    def body(self) -> dict[str, Any]:
        """Raises AnswerBrokeOff."""
        choices, usage = self._choices.finished()
        body = {
            "id": self._reply.id,
            "object": "chat.completion",
            "created": self._reply.created,
            "model": self._reply.model,
            "choices": [self._choice_json(index, choice) for index, choice in enumerate(choices)],
            "usage": usage_json(usage),
            "system_fingerprint": None,
        }
        if self._reply.service_tier is not None:
            body["service_tier"] = "default"
        return body

    def _choice_json(self, index: int, choice: _Choice) -> dict[str, Any]:
        logprobs = {"content": choice.logprobs, "refusal": None} if self._reply.logprobs else None
        return {
            "index": index,
            "message": choice.message(self._reply),
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
        }


def _call_json(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def usage_json(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens, "image_tokens": usage.image_tokens},
    }


def logprobs_json(tokens: tuple[TokenLogprob, ...]) -> list[dict[str, Any]]:
    return [
        {**_token_json(token), "top_logprobs": [_token_json(top) for top in token.top]} for token in tokens
    ]


def _token_json(token: TokenLogprob) -> dict[str, Any]:
    # The order matters: max() keeps its first argument when the other is NaN.
    logprob = max(MIN_LOGPROB, token.logprob)
    return {"token": token.token, "logprob": logprob, "bytes": list(token.raw)}
