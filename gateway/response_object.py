"""The answer of `/v1/responses`, whole and as its stream of typed events."""

from __future__ import annotations

from typing import Any

from gateway.answer_items import AnswerSoFar, Step
from gateway.errors import error_body
from gateway.events import Event, Started, Usage
from gateway.response_items import events_of, item_json
from gateway.responses_schema import ResponsesRequest
from gateway.streaming import KEEPALIVE, named_sse
from protos.errors import ServingError


class ResponseObject:
    """Collects the events of one answer, and shows what there is of it."""

    def __init__(self, request: ResponsesRequest, request_id: str, created: int, model: str) -> None:
        """`created`: Unix time, seconds."""
        self.request_id = request_id
        self._head = {"id": f"resp_{request_id}", "object": "response", "created_at": created}
        self._echo = _echo(request, model)
        self._answer = AnswerSoFar()

    def add(self, event: Event) -> list[Step]:
        """What has changed of the output."""
        return self._answer.add(event)

    @property
    def status(self) -> str:
        """Of an item that is closed now, and of the finished answer."""
        return "incomplete" if self._answer.is_cut else "completed"

    def body(self) -> dict[str, Any]:
        """Raises AnswerBrokeOff."""
        _, usage = self._answer.end()
        details = {"reason": "max_output_tokens"} if self.status == "incomplete" else None
        return self._json(self.status, self._output(self.status), details, _usage_json(usage))

    def in_progress(self) -> dict[str, Any]:
        return self._json("in_progress", [])

    def failed(self, error: ServingError) -> dict[str, Any]:
        message = error_body(error)["error"]["message"]
        body = self._json("failed", self._output("incomplete"))
        return {**body, "error": {"code": "server_error", "message": message}}

    def _output(self, status: str) -> list[dict[str, Any]]:
        """`status`: of the last item; those before it are complete."""
        items = self._answer.items
        statuses = ["completed"] * (len(items) - 1) + [status]
        return [item_json(item, self.request_id, each) for item, each in zip(items, statuses, strict=False)]

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
    reasoning, choice = request.reasoning, request.tool_choice
    return {
        "model": model,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": reasoning and reasoning.effort, "summary": reasoning and reasoning.summary},
        "background": False,
        "store": False,
        "temperature": request.temperature,
        "text": {"format": {"type": "text"}, **text},
        "tool_choice": "auto"
        if choice is None
        else choice
        if isinstance(choice, str)
        else choice.model_dump(),
        "tools": [tool.model_dump() for tool in request.tools or ()],
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
        self.is_admitted = self.is_admitted or isinstance(event, Started)
        steps = self._response.add(event)
        return self._begin() + b"".join(map(self._step, steps)) if steps else b""

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

    def _begin(self) -> bytes:
        if self._has_begun:
            return b""
        self._has_begun = True
        response = self._response.in_progress()
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def _step(self, step: Step) -> bytes:
        events = events_of(step, self._response.request_id, self._response.status)
        return b"".join(self._event(f"response.{name}", **fields) for name, fields in events)

    def _event(self, name: str, /, **fields: Any) -> bytes:
        sequence, self._sequence = self._sequence, self._sequence + 1
        return named_sse(name, {"sequence_number": sequence, **fields})
