"""The body of `POST /v1/responses`, and the chat request that answers it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, field_validator
from pydantic_core import PydanticCustomError

from gateway.adaptation import Adaptation, Place, given, same_fields
from gateway.responses_tools import (
    FunctionCallItem,
    FunctionChoice,
    FunctionOutputItem,
    FunctionTool,
    chat_choice,
    chat_tools,
)
from gateway.schema import (
    MAX_TOP_LOGPROBS,
    ChatCompletionRequest,
    ChatMessage,
    PositiveInt,
    SamplingFields,
)
from gateway.strict_model import StrictModel, text_or_list
from gateway.tool_schema import MAX_TOOLS

MEDIA_TYPES = ("input_image", "input_file")
LOGPROBS = "message.output_text.logprobs"
_SAMPLING = tuple(SamplingFields.model_fields.keys() - {"n", "max_tokens"})
_NAMES = {
    "max_completion_tokens": "max_output_tokens",
    "response_format.json_schema": "text.format",
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


_ITEM_TYPES = ("message", "reasoning", "function_call", "function_call_output")


def _item_tag(value: Any) -> str | None:
    kind = value.get("type", "message") if isinstance(value, Mapping) else None
    return f"#{kind}" if kind in _ITEM_TYPES else None


Item = Annotated[
    Annotated[ChatMessage, Tag("#message")]
    | Annotated[ReasoningItem, Tag("#reasoning")]
    | Annotated[FunctionCallItem, Tag("#function_call")]
    | Annotated[FunctionOutputItem, Tag("#function_call_output")],
    Discriminator(
        _item_tag,
        custom_error_type="unsupported_value",
        custom_error_message=f"must be an item of one of the types {', '.join(_ITEM_TYPES)}",
    ),
]


Input = Annotated[
    Annotated[str, Tag("#string")] | Annotated[list[Item], Field(min_length=1), Tag("#list")],
    Discriminator(
        text_or_list,
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
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
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
            "tools": request.tools and chat_tools(request.tools),
            "tool_choice": chat_choice(request.tool_choice),
            "parallel_tool_calls": request.parallel_tool_calls,
        }
    )
    if request.wants_logprobs:
        fields |= {"logprobs": True, "top_logprobs": request.top_logprobs or 0}
    body = {**same_fields(request, _SAMPLING), **fields, "messages": messages}
    return adaptation.chat(body), adaptation


def _messages(request: ResponsesRequest) -> tuple[list[Any], list[Place]]:
    """Chat messages, and where each one was."""
    conversation = _Conversation()
    if request.instructions is not None:
        conversation.add({"role": "system", "content": request.instructions}, Place("instructions"))
    if isinstance(request.input, str):
        conversation.add({"role": "user", "content": request.input}, Place("input"))
    else:
        for index, item in enumerate(request.input):
            conversation.add_item(item, f"input.{index}")
    conversation.show_media()
    return conversation.messages, conversation.places


class _Conversation:
    """Items one by one: calls join the message of the assistant before them."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.places: list[Place] = []
        self._media: list[tuple[dict[str, Any], str]] = []  # parts of outputs, and where they are

    def add(self, message: Any, place: Place) -> None:
        self.messages.append(message)
        self.places.append(place)

    def add_item(
        self, item: ChatMessage | ReasoningItem | FunctionCallItem | FunctionOutputItem, at: str
    ) -> None:
        if isinstance(item, FunctionOutputItem):
            self._add_output(item, f"{at}.output")
            return
        self.show_media()
        if isinstance(item, FunctionCallItem):
            self._add_call(item, at)
        elif isinstance(item, ChatMessage):
            self.add(item, Place(f"{at}.content"))

    def show_media(self) -> None:
        """Pictures and files that functions have answered: templates show them in user messages alone."""
        if self._media:
            parts, places = zip(*self._media, strict=True)
            self._media = []
            self.add({"role": "user", "content": [*parts]}, Place(places[0], places))

    def _add_call(self, item: FunctionCallItem, at: str) -> None:
        last = self.messages[-1] if self.messages else None
        if not isinstance(last, ChatMessage) or last.role != "assistant":
            last = ChatMessage(role="assistant")
            self.add(last, Place(at))
        self.messages[-1] = last.model_copy(update={"tool_calls": [*last.calls, item.call]})
        place = self.places[-1]
        self.places[-1] = Place(place.content, place.parts, (*place.calls, at))

    def _add_output(self, item: FunctionOutputItem, at: str) -> None:
        content, places = item.output, None
        if not isinstance(content, str):
            placed = [(part, f"{at}.{index}") for index, part in enumerate(content)]
            self._media += [each for each in placed if each[0].get("type") in MEDIA_TYPES]
            texts = [each for each in placed if each[0].get("type") not in MEDIA_TYPES]
            content, places = [part for part, _ in texts] or "", tuple(place for _, place in texts)
        message = {"role": "tool", "tool_call_id": item.call_id, "content": content}
        self.add(message, Place(at, places))


def _response_format(text: TextOptions | None) -> dict[str, Any] | None:
    """Chat has one more level for a schema."""
    if text is None or text.format is None or text.format.get("type") != "json_schema":
        return None if text is None else text.format
    inner = {key: value for key, value in text.format.items() if key != "type"}
    return {"type": "json_schema", "json_schema": inner}
