"""The body of `POST /v1/responses`, and the chat request that answers it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, field_validator
from pydantic_core import PydanticCustomError

from gateway.adaptation import Adaptation, given, same_fields
from gateway.schema import (
    MAX_TOP_LOGPROBS,
    ChatCompletionRequest,
    ChatMessage,
    PositiveInt,
    SamplingFields,
)
from gateway.strict_model import StrictModel

LOGPROBS = "message.output_text.logprobs"
_SAMPLING = tuple(SamplingFields.model_fields.keys() - {"n", "max_tokens"})
_NAMES = {
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "response_format.type": "text.format.type",
    "response_format.json_schema.name": "text.format.name",
    "response_format.json_schema.schema": "text.format.schema",
    "reasoning_effort": "reasoning.effort",
    "messages": "input",
}


class ReasoningItem(StrictModel):
    """Earlier reasoning, which no template repeats."""

    type: Literal["reasoning"]


def _item_tag(value: Any) -> str | None:
    kind = value.get("type", "message") if isinstance(value, Mapping) else None
    return {"message": "#message", "reasoning": "#reasoning"}.get(kind) if isinstance(kind, str) else None


Item = Annotated[
    Annotated[ChatMessage, Tag("#message")] | Annotated[ReasoningItem, Tag("#reasoning")],
    Discriminator(
        _item_tag,
        custom_error_type="unsupported_value",
        custom_error_message="must be an item of type message or reasoning",
    ),
]


def _input_tag(value: Any) -> str | None:
    return "#string" if isinstance(value, str) else "#items" if isinstance(value, list) else None


Input = Annotated[
    Annotated[str, Tag("#string")] | Annotated[list[Item], Field(min_length=1), Tag("#items")],
    Discriminator(
        _input_tag,
        custom_error_type="content_type",
        custom_error_message="must be a string or an array of items",
    ),
]


class TextOptions(StrictModel):
    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ReasoningOptions(StrictModel):
    effort: str | None = None
    summary: str | None = None


class ResponsesRequest(SamplingFields):
    """Stateless: nothing is stored, and nothing that was stored can be named."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    input: Input
    instructions: str | None = None
    max_output_tokens: PositiveInt | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    include: list[str] | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    metadata: dict[str, str] | None = None
    stream: bool | None = None
    tools: list[Any] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    previous_response_id: None = None
    conversation: None = None
    prompt: None = None
    service_tier: str | None = None

    @field_validator("previous_response_id", mode="before")
    @classmethod
    def _refuse_history(cls, value: Any) -> Any:
        if value is not None:
            raise PydanticCustomError("previous_response_not_found", "this server stores no responses")
        return value

    @field_validator("conversation", "prompt", mode="before")
    @classmethod
    def _refuse_references(cls, value: Any) -> Any:
        if value is not None:
            raise PydanticCustomError("unsupported_value", "names what is stored; this server stores nothing")
        return value

    @field_validator("tools")
    @classmethod
    def _refuse_tools(cls, tools: list[Any] | None) -> list[Any] | None:
        if tools:
            raise PydanticCustomError("unsupported_parameter", "tools are not supported by this endpoint")
        return tools

    @field_validator("n")
    @classmethod
    def _one_answer(cls, n: int | None) -> int | None:
        if n not in (None, 1):
            raise PydanticCustomError("unsupported_parameter", "a response has one answer")
        return n

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())


def adapt_response(request: ResponsesRequest) -> tuple[ChatCompletionRequest, Adaptation]:
    """The chat request that answers `request`.

    Raises:
        RequestError: names the field at fault as `request` calls it.
    """
    messages, places = _messages(request)
    adaptation = Adaptation(tuple(places), _NAMES, "input")
    max_tokens = request.max_output_tokens
    fields = given(
        {
            "model": request.model,
            "max_completion_tokens": request.max_tokens if max_tokens is None else max_tokens,
            "stream": request.stream,
            "response_format": _response_format(request.text),
            "reasoning_effort": request.reasoning and request.reasoning.effort,
            "service_tier": request.service_tier,
        }
    )
    if request.wants_logprobs:
        fields |= {"logprobs": True, "top_logprobs": request.top_logprobs or 0}
    body = {**same_fields(request, _SAMPLING), **fields, "messages": messages}
    return adaptation.chat(body), adaptation


def _messages(request: ResponsesRequest) -> tuple[list[Any], list[str]]:
    """Chat messages, and the path of each one's content."""
    messages: list[Any] = []
    places = []
    if request.instructions is not None:
        messages.append({"role": "system", "content": request.instructions})
        places.append("instructions")
    if isinstance(request.input, str):
        return [*messages, {"role": "user", "content": request.input}], [*places, "input"]
    for index, item in enumerate(request.input):
        if isinstance(item, ChatMessage):
            messages.append(item)
            places.append(f"input.{index}.content")
    return messages, places


def _response_format(text: TextOptions | None) -> dict[str, Any] | None:
    """Chat has one more level for a schema."""
    if text is None or text.format is None or text.format.get("type") != "json_schema":
        return None if text is None else text.format
    inner = {key: value for key, value in text.format.items() if key != "type"}
    return {"type": "json_schema", "json_schema": inner}
