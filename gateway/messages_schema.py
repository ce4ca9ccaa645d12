"""The bodies of Anthropic's Messages API, and the chat request that answers them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, field_validator
from pydantic_core import PydanticCustomError

from gateway.adaptation import Adaptation, given, same_fields
from gateway.schema import (
    MAX_STOP_STRINGS,
    ChatCompletionRequest,
    PositiveInt,
)
from gateway.strict_model import StrictModel

BLOCK_TYPES = "text, image, document, thinking, redacted_thinking"
_SAMPLING = ("temperature", "top_p", "top_k")
_NAMES = {
    "max_completion_tokens": "max_tokens",
    "stop": "stop_sequences",
    "image_url.url": "source",
    "file.file_data": "source.data",
    "file.file_url": "source.url",
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


_BLOCK_TAGS = {
    "text": "#text",
    "image": "#image",
    "document": "#document",
    "thinking": "#thinking",
    "redacted_thinking": "#thinking",
}


_AnyBlock = TextBlock | ImageBlock | DocumentBlock | ThinkingBlock


def _block_tag(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, Mapping) else None
    return _BLOCK_TAGS.get(kind) if isinstance(kind, str) else None


Block = Annotated[
    Annotated[TextBlock, Tag("#text")]
    | Annotated[ImageBlock, Tag("#image")]
    | Annotated[DocumentBlock, Tag("#document")]
    | Annotated[ThinkingBlock, Tag("#thinking")],
    Discriminator(
        _block_tag,
        custom_error_type="unsupported_content_part",
        custom_error_message=f"must be one of the supported content block types: {BLOCK_TYPES}",
    ),
]


def _content_tag(value: Any) -> str | None:
    return "#string" if isinstance(value, str) else "#blocks" if isinstance(value, list) else None


_CONTENT_ERROR = {
    "custom_error_type": "content_type",
    "custom_error_message": "must be a string or an array of content blocks",
}
Blocks = Annotated[
    Annotated[str, Tag("#string")] | Annotated[list[Block], Tag("#blocks")],
    Discriminator(_content_tag, **_CONTENT_ERROR),
]
SystemText = Annotated[
    Annotated[str, Tag("#string")] | Annotated[list[TextBlock], Tag("#blocks")],
    Discriminator(_content_tag, **_CONTENT_ERROR),
]


class AnthropicMessage(StrictModel):
    role: Literal["user", "assistant"]
    content: Blocks


class CountTokensRequest(StrictModel):
    """Body of `POST /v1/messages/count_tokens`.  Undeclared keys are kept, to be counted."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    messages: Annotated[list[AnthropicMessage], Field(min_length=1)]
    system: SystemText | None = None
    tools: list[Any] | None = None
    thinking: dict[str, Any] | None = None

    @field_validator("thinking")
    @classmethod
    def _refuse_thinking(cls, thinking: dict[str, Any] | None) -> dict[str, Any] | None:
        # "adaptive" leaves it to the model, which may do without.
        if thinking is not None and thinking.get("type") not in ("disabled", "adaptive"):
            raise PydanticCustomError("unsupported_parameter", "thinking is not supported by this endpoint")
        return thinking

    @field_validator("tools")
    @classmethod
    def _refuse_tools(cls, tools: list[Any] | None) -> list[Any] | None:
        if tools:
            raise PydanticCustomError("unsupported_parameter", "tools are not supported by this endpoint")
        return tools


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
    messages = [{"role": each.role, "content": _content(each.content)} for each in request.messages]
    places = [f"messages.{index}.content" for index in range(len(messages))]
    if request.system:
        system = _content(request.system)
        messages.insert(0, {"role": "system", "content": system})
        places.insert(0, "system")
    adaptation = Adaptation(tuple(places), _NAMES, "messages")
    fields: dict[str, Any] = {"max_completion_tokens": 1}
    if isinstance(request, MessagesRequest):
        fields = {
            "max_completion_tokens": request.max_tokens,
            **given({"stop": request.stop_sequences, "stream": request.stream}),
            **same_fields(request, _SAMPLING),
        }
    return adaptation.chat({**fields, "messages": messages}), adaptation


def _content(blocks: str | Sequence[_AnyBlock]) -> str | list[Any]:
    return blocks if isinstance(blocks, str) else [_part(block) for block in blocks]


def _part(block: _AnyBlock) -> Any:
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
