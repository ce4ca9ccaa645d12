"""The chunks of a streamed chat completion as server-sent events, byte for byte what real clients accept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from json.encoder import encode_basestring_ascii
from typing import Any

from gateway.completion import Reply, logprobs_json, usage_json
from gateway.errors import AnswerBrokeOff, error_body
from gateway.events import CallDelta, Delta, Event, Finished, Restarted, Started, Usage
from gateway.streaming import DONE, KEEPALIVE, sse, sse_json
from gateway.tool_calls import ToolCalls
from protos.errors import ServingError


class ChunkEncoder:
    """Events of one answer to chunks: per choice a role, contents, one finish reason; then usage."""

    def __init__(
        self,
        reply: Reply,
        *,
        include_usage: bool = False,
        usage_in_chunks: bool = False,
        details: bool = False,
    ) -> None:
        """`details`: what the encoder cut, as soon as it is known, and timings beside the usage."""
        self._reply = reply
        head = {
            "id": reply.id,
            "object": "chat.completion.chunk",
            "created": reply.created,
            "model": reply.model,
        }
        if reply.service_tier is not None:
            head["service_tier"] = "default"
        # Most chunks of a choice differ in their text only: what is around it is rendered once.
        self._head = json.dumps(head, separators=(",", ":"))[:-1]
        tail = ',"usage":null' if include_usage else ""
        self._before = [
            f'data: {self._head},"choices":[{{"index":{index},"delta":{{"content":'
            for index in range(reply.num_choices)
        ]
        self._after = f'}},"logprobs":null,"finish_reason":null}}]{tail}}}\n\n'
        self._include_usage = include_usage
        self._usage_in_chunks = include_usage and usage_in_chunks
        self._details = details
        self._has_shown_media = not details
        self._logprobs = reply.logprobs
        self._silent = set(range(reply.num_choices))  # no role sent yet
        self._open = set(range(reply.num_choices))  # not finished yet
        self._calls = [ToolCalls() for _ in range(reply.num_choices)]
        self._prompt_tokens = 0
        self._completion_tokens = 0
        self._ended = False
        self._is_plain = not (reply.logprobs or self._usage_in_chunks)
        self.is_admitted = False  # whatever goes wrong from here on is not the request's fault

    def encode(self, event: Event) -> bytes:
        """Zero or more whole server-sent events."""
        if isinstance(event, Delta):
            self._completion_tokens += event.num_tokens
            if event.is_empty:
                return b""
            if event.index in self._silent:
                return self._role(event.index) + self._said(event)
            return self._said(event)
        if isinstance(event, Finished):
            self._open.discard(event.index)
            role = self._role(event.index)
            return role + self._choice(event.index, "{}", finish_reason=f'"{event.reason}"')
        if isinstance(event, Usage):
            self._ended = True
            return self._usage(event) if self._include_usage else b""
        if isinstance(event, Restarted):
            self._completion_tokens = 0
            return b""  # nothing had been said, so no call has begun
        assert isinstance(event, Started)
        self.is_admitted, self._prompt_tokens = True, event.prompt_tokens
        if self._has_shown_media:  # also when the answer was begun anew
            return b""
        self._has_shown_media = True
        media = [[asdict(part) for part in parts] for parts in event.media]
        return self._chunk("[]", self._usage_so_far(), {"media": media})

    def end(self) -> bytes:
        """Raises AnswerBrokeOff."""
        if self._open or not self._ended:
            raise AnswerBrokeOff
        return DONE

    def keepalive(self) -> bytes:
        return KEEPALIVE

    def failure(self, error: ServingError) -> bytes:
        """Wrapped: clients take any other form for a normal end."""
        return sse_json(error_body(error)) + DONE

    def _role(self, index: int) -> bytes:
        if index not in self._silent:
            return b""
        self._silent.discard(index)
        return self._choice(index, '{"role":"assistant","content":""}')

    def _said(self, delta: Delta) -> bytes:
        if not delta.reasoning and not delta.calls:
            return self._content(delta)
        deltas: list[dict[str, Any]] = []
        if delta.reasoning:
            deltas.append({**self._reply.reasoning(delta.reasoning)})
        if delta.text:
            deltas.append({"content": delta.text})
        deltas += [{"tool_calls": [self._call(delta.index, call)]} for call in delta.calls]
        first = self._choice(delta.index, _compact(deltas[0]), self._logprobs_of(delta))
        # The log-probabilities of the whole delta went with its first chunk.
        rest = (self._choice(delta.index, _compact(each)) for each in deltas[1:])
        return first + b"".join(rest)

    def _call(self, choice: int, delta: CallDelta) -> dict[str, Any]:
        """Id, type and name once: clients append what comes again."""
        call = self._calls[choice].add(delta)
        if not delta.name:
            return {"index": delta.index, "function": {"arguments": delta.arguments}}
        function = {"name": delta.name, "arguments": delta.arguments}
        return {"index": delta.index, "id": call.id, "type": "function", "function": function}

    def _content(self, delta: Delta) -> bytes:
        text = encode_basestring_ascii(delta.text)
        if self._is_plain:
            return f"{self._before[delta.index]}{text}{self._after}".encode()
        return self._choice(delta.index, f'{{"content":{text}}}', self._logprobs_of(delta))

    def _logprobs_of(self, delta: Delta) -> str:
        if not self._logprobs:
            return "null"
        return _compact({"content": logprobs_json(delta.logprobs), "refusal": None})

    def _choice(self, index: int, delta: str, logprobs: str = "null", finish_reason: str = "null") -> bytes:
        choice = (
            f'[{{"index":{index},"delta":{delta},"logprobs":{logprobs},"finish_reason":{finish_reason}}}]'
        )
        return self._chunk(choice, self._usage_so_far())

    def _usage(self, usage: Usage) -> bytes:
        details = None
        if self._details and usage.timings is not None:
            details = {"timings_ms": {name: round(ms, 3) for name, ms in asdict(usage.timings).items()}}
        return self._chunk("[]", _compact(usage_json(usage)), details)

    def _usage_so_far(self) -> str | None:
        if self._usage_in_chunks:
            return _compact(usage_json(Usage(self._prompt_tokens, self._completion_tokens)))
        return "null" if self._include_usage else None

    def _chunk(self, choices: str, usage: str | None, details: Mapping[str, Any] | None = None) -> bytes:
        tail = "" if usage is None else f',"usage":{usage}'
        if details is not None:
            tail += f',"details":{_compact(details)}'
        return sse(f'{self._head},"choices":{choices}{tail}}}')


def _compact(value: Any) -> str:
    """ASCII only: clients that split lines at U+2028 exist."""
    return json.dumps(value, separators=(",", ":"))
