"""The bodies of Anthropic's Messages API, and the chat request that answers them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, field_validator
from pydantic_core import PydanticCustomError

from gateway.adaptation import Adaptation, Place, given, same_fields
from gateway.errors import THREAD_UNSUPPORTED, RequestError
from gateway.messages_tools import AnthropicChoice, AnthropicTool, ToolUseBlock, chat_choice, chat_tools
from gateway.schema import MAX_STOP_STRINGS, ChatCompletionRequest, PositiveInt
from gateway.strict_model import StrictModel, text_or_list
from gateway.tool_schema import MAX_TOOLS

BLOCK_TYPES = "text, image, document, tool_use, tool_result, thinking, redacted_thinking"
_SAMPLING = ("temperature", "top_p", "top_k")
_NAMES = {
    "max_completion_tokens": "max_tokens",
    "stop": "stop_sequences",
    "image_url.url": "source",
    "file.file_data": "source.data",
    "file.file_url": "source.url",
    "response_format.json_schema": "output_config.format",
    "response_format": "output_config.format",
    "parameters": "input_schema",
}


class Base64Source(StrictModel):
    type: Literal["base64"]
    media_type: Annotated[str, Field(max_length=64)]
    data: str


class UrlSource(StrictModel):
    type: Literal["url"]
    url: str


class TextSource(StrictModel):
    type: Literal["text"]
    media_type: Literal["text/plain"] = "text/plain"
    data: str


def _source_tag(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, Mapping) else None
    return f"#{kind}" if kind in ("base64", "url", "text") else None


_SOURCE_ERROR = {
    "custom_error_type": "unsupported_value",
    "custom_error_message": "must be a source of type base64, url, or, for documents, text",
}


class TextBlock(StrictModel):
    type: Literal["text"]
    text: str


class ThinkingBlock(StrictModel):
    """Earlier reasoning; templates drop it."""

    type: Literal["thinking", "redacted_thinking"]


class ImageBlock(StrictModel):
    type: Literal["image"]
    source: Annotated[
        Annotated[Base64Source, Tag("#base64")] | Annotated[UrlSource, Tag("#url")],
        Discriminator(_source_tag, **_SOURCE_ERROR),
    ]


class DocumentBlock(StrictModel):
    type: Literal["document"]
    source: Annotated[
        Annotated[Base64Source, Tag("#base64")]
        | Annotated[UrlSource, Tag("#url")]
        | Annotated[TextSource, Tag("#text")],
        Discriminator(_source_tag, **_SOURCE_ERROR),
    ]


_CONTENT_ERROR = {
    "custom_error_type": "content_type",
    "custom_error_message": "must be a string or an array of content blocks",
}
_BLOCK_TAGS = {
    "text": "#text",
    "image": "#image",
    "document": "#document",
    "tool_use": "#tool_use",
    "tool_result": "#tool_result",
    "thinking": "#thinking",
    "redacted_thinking": "#thinking",
}


def _block_tag(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, Mapping) else None
    return _BLOCK_TAGS.get(kind) if isinstance(kind, str) else None


def _result_tag(value: Any) -> str | None:
    tag = _block_tag(value)
    return tag if tag in ("#text", "#image", "#document") else None


_ResultBlock = Annotated[
    Annotated[TextBlock, Tag("#text")]
    | Annotated[ImageBlock, Tag("#image")]
    | Annotated[DocumentBlock, Tag("#document")],
    Discriminator(
        _result_tag,
        custom_error_type="unsupported_content_part",
        custom_error_message="must be one of the types that a tool result may have: text, image, document",
    ),
]


class ToolResultBlock(StrictModel):
    """What the caller's tool has answered.  `is_error` is ignored: templates have no sign for it."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: Annotated[
        Annotated[str, Tag("#string")] | Annotated[list[_ResultBlock], Tag("#list")],
        Discriminator(text_or_list, **_CONTENT_ERROR),
    ] = ""


Block = Annotated[
    Annotated[TextBlock, Tag("#text")]
    | Annotated[ImageBlock, Tag("#image")]
    | Annotated[DocumentBlock, Tag("#document")]
    | Annotated[ToolUseBlock, Tag("#tool_use")]
    | Annotated[ToolResultBlock, Tag("#tool_result")]
    | Annotated[ThinkingBlock, Tag("#thinking")],
    Discriminator(
        _block_tag,
        custom_error_type="unsupported_content_part",
        custom_error_message=f"must be one of the supported content block types: {BLOCK_TYPES}",
    ),
]
Blocks = Annotated[
    Annotated[str, Tag("#string")] | Annotated[list[Block], Tag("#list")],
    Discriminator(text_or_list, **_CONTENT_ERROR),
]
SystemText = Annotated[
    Annotated[str, Tag("#string")] | Annotated[list[TextBlock], Tag("#list")],
    Discriminator(text_or_list, **_CONTENT_ERROR),
]


class AnthropicMessage(StrictModel):
    role: Literal["user", "assistant"]
    content: Blocks


class ThinkingConfig(StrictModel):
    """`budget_tokens` is not enforced."""

    type: Literal["enabled", "disabled", "adaptive"]

    @property
    def is_enabled(self) -> bool | None:
        """None: the model's own habit, to which "adaptive" leaves it."""
        return None if self.type == "adaptive" else self.type == "enabled"


class OutputFormat(StrictModel):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(StrictModel):
    format: OutputFormat | None = None


class CountTokensRequest(StrictModel):
    """Body of `POST /v1/messages/count_tokens`.  Undeclared keys are kept, to be counted."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    messages: Annotated[list[AnthropicMessage], Field(min_length=1)]
    system: SystemText | None = None
    tools: Annotated[list[AnthropicTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: AnthropicChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    thread: None = None

    @field_validator("thread", mode="before")
    @classmethod
    def _refuse_threads(cls, value: Any) -> Any:
        if value is not None:
            raise PydanticCustomError(THREAD_UNSUPPORTED, "names what is stored; this server stores nothing")
        return value


class MessagesRequest(CountTokensRequest):
    """Body of `POST /v1/messages`."""

    max_tokens: PositiveInt
    stop_sequences: Annotated[list[str], Field(max_length=MAX_STOP_STRINGS)] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None


def adapt_messages(request: CountTokensRequest) -> tuple[ChatCompletionRequest, Adaptation]:
    """The chat request that answers `request`, or has as many tokens.

    Raises:
        RequestError: names the field at fault as `request` calls it.
    """
    messages: list[Any] = []
    places: list[Place] = []
    if request.system:
        messages.append({"role": "system", "content": _content(request.system)})
        places.append(Place("system"))
    for index, message in enumerate(request.messages):
        for adapted, place in _adapted(message, f"messages.{index}.content"):
            messages.append(adapted)
            places.append(place)
    adaptation = Adaptation(tuple(places), _NAMES, "messages")
    fields: dict[str, Any] = {"max_completion_tokens": 1}
    if isinstance(request, MessagesRequest):
        fields = {
            "max_completion_tokens": request.max_tokens,
            **given({"stop": request.stop_sequences, "stream": request.stream}),
            **same_fields(request, _SAMPLING),
        }
    return adaptation.chat({**fields, **_asked(request), "messages": messages}), adaptation


def _asked(request: CountTokensRequest) -> dict[str, Any]:
    """What has a say in the prompt, beside the messages."""
    choice, output = request.tool_choice, request.output_config
    return given(
        {
            "tools": request.tools and chat_tools(request.tools),
            "tool_choice": choice and chat_choice(choice),
            "parallel_tool_calls": False if choice and choice.disable_parallel_tool_use else None,
            "enable_thinking": request.thinking and request.thinking.is_enabled,
            "response_format": output and output.format and _response_format(output.format),
        }
    )


def _response_format(asked: OutputFormat) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"schema": asked.schema_}}


def _adapted(message: AnthropicMessage, at: str) -> Iterator[tuple[dict[str, Any], Place]]:
    """Its results first, each a message of its own; then the rest."""
    if isinstance(message.content, str):
        yield {"role": message.role, "content": message.content}, Place(at)
        return
    calls: list[tuple[dict[str, Any], str]] = []
    parts: list[tuple[Any, str]] = []
    for position, block in enumerate(message.content):
        where = f"{at}.{position}"
        if isinstance(block, ToolUseBlock):
            _check_role(message, "assistant", where)
            calls.append((block.chat_call(), where))
        elif isinstance(block, ToolResultBlock):
            _check_role(message, "user", where)
            media, result, place = _result(block, where)
            parts += media
            yield result, place
        else:
            parts.append((_part(block), where))
    if not (parts or calls) and message.content:
        return
    content = {"role": message.role, "content": [part for part, _ in parts]}
    if calls:
        content["tool_calls"] = [call for call, _ in calls]
    yield content, Place(at, tuple(where for _, where in parts), tuple(where for _, where in calls))


def _result(block: ToolResultBlock, at: str) -> tuple[list[tuple[Any, str]], dict[str, Any], Place]:
    """Pictures and documents go to the message behind: templates show them in user messages alone."""
    place = f"{at}.content"
    media: list[tuple[Any, str]] = []
    texts: list[tuple[Any, str]] = []
    if not isinstance(block.content, str):
        for position, inner in enumerate(block.content):
            placed = (_part(inner), f"{place}.{position}")
            (texts if placed[0]["type"] == "text" else media).append(placed)
    content = block.content if isinstance(block.content, str) else [part for part, _ in texts] or ""
    result = {"role": "tool", "tool_call_id": block.tool_use_id, "content": content}
    return media, result, Place(place, tuple(where for _, where in texts))


def _check_role(message: AnthropicMessage, role: str, param: str) -> None:
    if message.role != role:
        kind = "Calls of tools" if role == "assistant" else "Results of tools"
        text = f"'{param}' is in a message of the {message.role}. {kind} belong in those of the {role}."
        raise RequestError(text, code="unsupported_content_part", param=param)


def _content(blocks: str | Sequence[TextBlock]) -> str | list[Any]:
    return blocks if isinstance(blocks, str) else [_part(block) for block in blocks]


def _part(block: TextBlock | ImageBlock | DocumentBlock | ThinkingBlock) -> Any:
    if isinstance(block, TextBlock):
        return {"type": "text", "text": block.text}
    if isinstance(block, ThinkingBlock):
        return {"type": "thinking"}
    source = block.source
    if isinstance(source, TextSource):
        return {"type": "text", "text": source.data}
    url = source.url if isinstance(source, UrlSource) else f"data:{source.media_type};base64,{source.data}"
    if isinstance(block, ImageBlock):
        return {"type": "image_url", "image_url": {"url": url}}
    return {"type": "file", "file": {"file_url" if isinstance(source, UrlSource) else "file_data": url}}
