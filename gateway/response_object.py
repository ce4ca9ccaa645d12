"""The answer of `/v1/responses`, whole and as its stream of typed events."""

from __future__ import annotations

from typing import Any

from gateway.completion import logprobs_json
from gateway.errors import error_body
from gateway.events import Delta, Event, Finished, Restarted, Started, Usage
from gateway.responses_schema import ResponsesRequest
from gateway.streaming import KEEPALIVE, named_sse
from protos.errors import ModelError, ServingError

_BROKEN_OFF = "the language model ended an answer without finishing it"


class ResponseObject:
    """Collects the events of one answer, and shows what there is of it."""

    def __init__(self, request: ResponsesRequest, request_id: str, created: int, model: str) -> None:
        """`created`: Unix time, seconds."""
        self.item_id = f"msg_{request_id}"
        self.wants_logprobs = request.wants_logprobs
        self._head = {"id": f"resp_{request_id}", "object": "response", "created_at": created}
        self._echo = _echo(request, model)
        self._begin()

    def _begin(self) -> None:
        self._texts: list[str] = []
        self.logprobs: list[dict[str, Any]] = []
        self._finish_reason = ""
        self._usage: Usage | None = None

    def add(self, event: Event) -> None:
        if isinstance(event, Delta):
            self._texts.append(event.text)
            self.logprobs.extend(logprobs_json(event.logprobs))
        elif isinstance(event, Finished):
            self._finish_reason = event.reason
        elif isinstance(event, Usage):
            self._usage = event
        elif isinstance(event, Restarted):
            self._begin()

    @property
    def text(self) -> str:
        return "".join(self._texts)

    @property
    def status(self) -> str:
        """Of the finished answer."""
        return "incomplete" if self._finish_reason == "length" else "completed"

    def body(self) -> dict[str, Any]:
        """Raises ModelError when the answer broke off."""
        if self._usage is None or not self._finish_reason:
            raise ModelError(_BROKEN_OFF)
        details = {"reason": "max_output_tokens"} if self.status == "incomplete" else None
        return self._json(self.status, [self.item(self.status)], details, _usage_json(self._usage))

    def in_progress(self) -> dict[str, Any]:
        return self._json("in_progress", [])

    def failed(self, error: ServingError) -> dict[str, Any]:
        message = error_body(error)["error"]["message"]
        body = self._json("failed", [self.item("incomplete")] if self._texts else [])
        return {**body, "error": {"code": "server_error", "message": message}}

    def item(self, status: str) -> dict[str, Any]:
        """The message; without content while it is in progress."""
        content = [] if status == "in_progress" else [self.part(self.text)]
        head = {"id": self.item_id, "type": "message", "role": "assistant"}
        return {**head, "status": status, "content": content}

    def part(self, text: str) -> dict[str, Any]:
        logprobs = self.logprobs if text else []
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _json(
        self,
        status: str,
        output: list[dict[str, Any]],
        incomplete: dict[str, Any] | None = None,
        usage: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        state = {"status": status, "error": None, "incomplete_details": incomplete, "usage": usage}
        return {**self._head, **self._echo, **state, "output": output}


def _echo(request: ResponsesRequest, model: str) -> dict[str, Any]:
    """What a response repeats of its request."""
    text = request.text.model_dump(exclude_none=True) if request.text is not None else {}
    reasoning = request.reasoning
    return {
        "model": model,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": reasoning and reasoning.effort, "summary": reasoning and reasoning.summary},
        "background": False,
        "store": False,
        "temperature": request.temperature,
        "text": {"format": {"type": "text"}, **text},
        "tool_choice": request.tool_choice or "auto",
        "tools": [],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": request.top_p,
        "truncation": "disabled",
    }


def _usage_json(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cache_write_tokens": 0,
            "image_tokens": usage.image_tokens,
        },
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


class ResponseEncoder:
    """Events of one answer to typed events with increasing sequence numbers; the official order."""

    def __init__(self, response: ResponseObject) -> None:
        self._response = response
        self._sequence = 0
        self._has_begun = False
        self.is_admitted = False

    def encode(self, event: Event) -> bytes:
        if isinstance(event, Delta):
            return self._delta(event)
        self._response.add(event)
        if isinstance(event, Finished):
            return self._begin() + self._finish()
        self.is_admitted = self.is_admitted or isinstance(event, Started)
        return b""

    def keepalive(self) -> bytes:
        return KEEPALIVE

    def end(self) -> bytes:
        body = self._response.body()
        return self._event(f"response.{body['status']}", response=body)

    def failure(self, error: ServingError) -> bytes:
        """`response.failed`, and an error both flat, as documented, and wrapped, so that clients raise it."""
        failed = self._event("response.failed", response=self._response.failed(error))
        wrapped = error_body(error)["error"]
        flat = {key: wrapped[key] for key in ("code", "message", "param")}
        return failed + self._event("error", **flat, error=wrapped)

    def _delta(self, delta: Delta) -> bytes:
        self._response.add(delta)
        if not delta.text and not delta.logprobs:
            return b""
        fields = {"delta": delta.text, "logprobs": logprobs_json(delta.logprobs)}
        return self._begin() + self._event("response.output_text.delta", **self._place(), **fields)

    def _begin(self) -> bytes:
        if self._has_begun:
            return b""
        self._has_begun = True
        response = self._response
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        return b"".join(
            (
                self._event("response.created", response=response.in_progress()),
                self._event("response.in_progress", response=response.in_progress()),
                self._event("response.output_item.added", output_index=0, item=response.item("in_progress")),
                self._event("response.content_part.added", **self._place(), part=part),
            )
        )

    def _finish(self) -> bytes:
        response, place = self._response, self._place()
        text, logprobs = response.text, response.logprobs
        item = response.item(response.status)
        return b"".join(
            (
                self._event("response.output_text.done", **place, text=text, logprobs=logprobs),
                self._event("response.content_part.done", **place, part=response.part(text)),
                self._event("response.output_item.done", output_index=0, item=item),
            )
        )

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._response.item_id, "output_index": 0, "content_index": 0}

    def _event(self, name: str, **fields: Any) -> bytes:
        sequence, self._sequence = self._sequence, self._sequence + 1
        return named_sse(name, {"sequence_number": sequence, **fields})
