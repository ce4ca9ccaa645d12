"""The turns of a conversation as plain values, made from chat messages under the rules of the API.

Every part remembers the path it came from, so that an error found later can name it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gateway.errors import RequestError
from gateway.media import decode_data_uri
from gateway.model_info import ModelInfo
from gateway.schema import ChatMessage, ImagePart, ImageUrl, RefusalPart, TextPart

# InternVL's data sets end a line between neighbouring texts; vLLM and LMDeploy do the same.
TEXT_SEPARATOR = "\n"


@dataclass(frozen=True)
class Text:
    text: str
    param: str  # path into the JSON body


@dataclass(frozen=True)
class Picture:
    data: bytes  # encoded, as the client sent it
    param: str  # path of the part
    url_param: str  # path of the data URI
    min_tiles: int | None = None  # None: the checkpoint's default
    max_tiles: int | None = None


@dataclass(frozen=True)
class Turn:
    role: str  # "system", "user" or "assistant"
    parts: tuple[Text | Picture, ...]


@dataclass(frozen=True)
class MediaLimits:
    max_images: int  # of one request
    max_bytes: int  # of all pictures of one request
    max_tiles: int  # of one picture; 0: unknown here


def media_limits(model: ModelInfo, max_images: int, max_bytes: int) -> MediaLimits:
    """The tighter of what the gateway and the model allow."""
    return MediaLimits(
        max_images=min(max_images, model.max_images or max_images),
        max_bytes=min(max_bytes, model.max_media_bytes or max_bytes),
        max_tiles=model.max_tiles,
    )


async def read_conversation(messages: Sequence[ChatMessage], limits: MediaLimits) -> tuple[Turn, ...]:
    """Decode the pictures and join neighbouring texts.

    Raises:
        RequestError: a picture outside a user message, too many of them, or one that is malformed.
    """
    _check_pictures(messages, limits)
    turns, budget = [], limits.max_bytes
    for index, message in enumerate(messages):
        parts: list[Text | Picture] = []
        for param, part in _parts(message, f"messages.{index}.content"):
            if isinstance(part, Text):
                _append_text(parts, part)
                continue
            picture = await _read_picture(part, param, limits, budget)
            budget -= len(picture.data)
            parts.append(picture)
        role = "system" if message.role == "developer" else message.role
        turns.append(Turn(role, tuple(parts)))
    return tuple(turns)


def _check_pictures(messages: Sequence[ChatMessage], limits: MediaLimits) -> None:
    """Counted before any is decoded."""
    count = 0
    for index, message in enumerate(messages):
        for position, part in enumerate(message.content if isinstance(message.content, list) else ()):
            if not isinstance(part, ImagePart):
                continue
            count += 1
            param = f"messages.{index}.content.{position}"
            if message.role != "user":
                text = f"'{param}' is an image in a {message.role} message; images belong in user messages."
                raise RequestError(text, code="unsupported_content_part", param=param)
            if count > limits.max_images:
                text = f"A request may have at most {limits.max_images} images; '{param}' is one more."
                raise RequestError(text, code="too_many_images", param="messages")


def _parts(message: ChatMessage, param: str) -> Iterator[tuple[str, Text | ImagePart]]:
    content = message.content
    if not content and not isinstance(content, str):
        if message.role != "assistant":
            text = f"'{param}' must not be empty in a {message.role} message."
            raise RequestError(text, code="missing_required_parameter", param=param)
        content = ""
    if isinstance(content, str):
        yield param, Text(content, param)
        return
    assert content is not None
    for position, part in enumerate(content):
        place = f"{param}.{position}"
        if isinstance(part, ImagePart):
            yield place, part
        elif isinstance(part, TextPart):
            yield place, Text(part.text, f"{place}.text")
        elif isinstance(part, RefusalPart):
            yield place, Text(part.refusal, f"{place}.refusal")


def _append_text(parts: list[Text | Picture], text: Text) -> None:
    last = parts[-1] if parts else None
    if isinstance(last, Text):
        parts[-1] = Text(last.text + TEXT_SEPARATOR + text.text, last.param)
    else:
        parts.append(text)


async def _read_picture(part: ImagePart, param: str, limits: MediaLimits, budget: int) -> Picture:
    url_param = f"{param}.image_url.url" if isinstance(part.image_url, ImageUrl) else f"{param}.image_url"
    min_tiles, max_tiles = _tiles(part.image, f"{param}.image_url", limits)
    data = await decode_data_uri(part.image.url, url_param, budget)
    return Picture(data, param, url_param, min_tiles, max_tiles)


def _tiles(image: ImageUrl, param: str, limits: MediaLimits) -> tuple[int | None, int | None]:
    """(min_tiles, max_tiles): explicit numbers win over `detail`; None is the checkpoint's default.

    "high" and "original" are that default too: it is the most tiles that the model was trained with.
    """
    lowest, highest = image.min_dynamic_patch, image.max_dynamic_patch
    for name, value in (("max_dynamic_patch", highest), ("min_dynamic_patch", lowest)):
        if value is not None and limits.max_tiles and value > limits.max_tiles:
            raise RequestError(
                f"Invalid value for '{param}.{name}': must be at most {limits.max_tiles}.",
                param=f"{param}.{name}",
            )
    if image.detail == "low":
        lowest, highest = lowest or 1, highest or max(lowest or 1, 1)
    if lowest is not None and highest is not None and lowest > highest:
        raise RequestError(
            f"Invalid value for '{param}.min_dynamic_patch': must be at most the most tiles, {highest}.",
            param=f"{param}.min_dynamic_patch",
        )
    return lowest, highest
