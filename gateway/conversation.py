"""The turns of a conversation as plain values, made from chat messages under the rules of the API.

Every part remembers the path it came from, so that an error found later can name it.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from gateway.errors import RequestError
from gateway.media import DOCUMENT, VIDEO, decode_data_uri, decode_file_data, is_web_url
from gateway.model_info import ModelInfo
from gateway.schema import (
    ChatMessage,
    FilePart,
    ImagePart,
    ImageUrl,
    InputFilePart,
    MmProcessorKwargs,
    RefusalPart,
    TextPart,
    VideoOptions,
    VideoPart,
)

# InternVL's data sets end a line between neighbouring texts; vLLM and LMDeploy do the same.
TEXT_SEPARATOR = "\n"
# All requests share a stream with the language model: what is larger must not hold it up.
UPLOAD_ABOVE_BYTES = 4 << 20


@dataclass(frozen=True)
class Text:
    text: str
    param: str  # path into the JSON body


@dataclass(frozen=True)
class Picture:
    data: bytes  # encoded, as the client sent it
    param: str  # path of the part
    url_param: str  # path of the URI
    min_tiles: int | None = None  # None: the checkpoint's default
    max_tiles: int | None = None
    use_thumbnail: bool | None = None
    url: str = ""  # instead of data: the encoder fetches it


@dataclass(frozen=True)
class Clip:
    """A video."""

    data: bytes  # encoded, as the client sent it
    param: str  # path of the part
    url_param: str  # path of the URI
    max_tiles: int | None = None  # of each frame; None: one
    num_frames: int | None = None
    fps: float | None = None
    start_s: float | None = None
    end_s: float | None = None
    upload: bytes = b""  # its SHA-256 where it is too large to go with the request
    url: str = ""  # instead of data: the encoder fetches it


@dataclass(frozen=True)
class Document:
    """A PDF."""

    data: bytes  # as the client sent it
    param: str  # path of the part
    url_param: str  # path of the file's data, or of its URI
    max_tiles: int | None = None  # of each page; None: the checkpoint's default
    upload: bytes = b""  # its SHA-256 where it is too large to go with the request
    url: str = ""  # instead of data: the encoder fetches it


Medium = Picture | Clip | Document
_ROLES = {"developer": "system", "function": "tool"}
_MediaParts = ImagePart | VideoPart | FilePart | InputFilePart


@dataclass(frozen=True)
class Call:
    """Of a tool, in an assistant's turn."""

    name: str
    arguments: str  # JSON, as the client sent it


@dataclass(frozen=True)
class Turn:
    role: str  # "system", "user", "assistant" or "tool"
    parts: tuple[Text | Medium, ...]
    calls: tuple[Call, ...] = ()
    # Path into the JSON body; "": that of the message at the same place.
    param: str = field(default="", compare=False)


@dataclass(frozen=True)
class MediaLimits:
    max_images: int  # of one request, videos and documents included
    max_bytes: int  # of all media of one request that go with it
    max_tiles: int  # of one picture; 0: unknown here
    max_upload_bytes: int = 0  # of a video or document that goes apart; 0: none does


@dataclass(frozen=True)
class MediaDefaults:
    """What holds for parts that leave it open."""

    video: VideoOptions = VideoOptions()
    picture: MmProcessorKwargs = MmProcessorKwargs()


NO_DEFAULTS = MediaDefaults()


def media_limits(model: ModelInfo, max_images: int, max_bytes: int) -> MediaLimits:
    """The tighter of what the gateway and the model allow."""
    return MediaLimits(
        max_images=min(max_images, model.max_images or max_images),
        max_bytes=min(max_bytes, model.max_media_bytes or max_bytes),
        max_tiles=model.max_tiles,
        max_upload_bytes=model.max_upload_bytes,
    )


async def read_conversation(
    messages: Sequence[ChatMessage], limits: MediaLimits, defaults: MediaDefaults = NO_DEFAULTS
) -> tuple[Turn, ...]:
    """Decode the media and join neighbouring texts.

    Answers of tools come in the order of their calls: templates show no ids.

    Raises:
        RequestError: a medium outside a user message, too many of them, or one that is malformed.
    """
    _check_tiles("max_dynamic_patch", defaults.picture.max_dynamic_patch, "mm_processor_kwargs", limits)
    _check_tiles("min_dynamic_patch", defaults.picture.min_dynamic_patch, "mm_processor_kwargs", limits)
    _check_media(messages, limits)
    turns, budget = [], limits.max_bytes
    for index in _in_call_order(messages):
        message, place = messages[index], f"messages.{index}"
        parts: list[Text | Medium] = []
        for param, part in _parts(message, f"{place}.content"):
            if isinstance(part, Text):
                _append_text(parts, part)
                continue
            medium = await _read_medium(part, param, limits, budget, defaults)
            budget -= 0 if is_upload(medium) else len(medium.data)
            parts.append(medium)
        calls = (Call(call.function.name, call.function.arguments) for call in message.calls)
        turns.append(Turn(_ROLES.get(message.role, message.role), tuple(parts), tuple(calls), place))
    return tuple(turns)


def _in_call_order(messages: Sequence[ChatMessage]) -> list[int]:
    """Places of the messages; tools' in a row are sorted by the calls before them, where all are known."""
    order: list[int] = []
    calls: dict[str | None, int] = {}  # id to place among the calls
    run: list[int] = []  # of tool messages
    for index, message in enumerate(messages):
        if message.role == "tool":
            run.append(index)
            continue
        order += _sorted(run, messages, calls)
        order.append(index)
        calls, run = {call.id: place for place, call in enumerate(message.calls)}, []
    return order + _sorted(run, messages, calls)


def _sorted(run: list[int], messages: Sequence[ChatMessage], calls: dict[str | None, int]) -> list[int]:
    if not all(messages[index].tool_call_id in calls for index in run):
        return run
    return sorted(run, key=lambda index: calls[messages[index].tool_call_id])


def is_upload(part: Text | Medium) -> bool:
    """Whether its bytes go apart from the request."""
    return isinstance(part, Clip | Document) and bool(part.upload)


def _check_media(messages: Sequence[ChatMessage], limits: MediaLimits) -> None:
    """Counted before any is decoded."""
    count = 0
    for index, message in enumerate(messages):
        for position, part in enumerate(message.content if isinstance(message.content, list) else ()):
            if not isinstance(part, _MediaParts):
                continue
            count += 1
            param = f"messages.{index}.content.{position}"
            if message.role != "user":
                noun = _noun(part)
                text = f"'{param}' is {noun} in a {message.role} message; media belong in user messages."
                raise RequestError(text, code="unsupported_content_part", param=param)
            if count > limits.max_images:
                text = f"A request may have at most {limits.max_images} images; '{param}' is one more."
                raise RequestError(text, code="too_many_images", param="messages")


def _noun(part: _MediaParts) -> str:
    if isinstance(part, ImagePart):
        return "an image"
    return "a video" if isinstance(part, VideoPart) else "a file"


def _parts(message: ChatMessage, param: str) -> Iterator[tuple[str, Text | _MediaParts]]:
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
        if isinstance(part, _MediaParts):
            yield place, part
        elif isinstance(part, TextPart):
            yield place, Text(part.text, f"{place}.text")
        elif isinstance(part, RefusalPart):
            yield place, Text(part.refusal, f"{place}.refusal")


def _append_text(parts: list[Text | Medium], text: Text) -> None:
    last = parts[-1] if parts else None
    if isinstance(last, Text):
        parts[-1] = Text(last.text + TEXT_SEPARATOR + text.text, last.param)
    else:
        parts.append(text)


async def _read_medium(
    part: _MediaParts, param: str, limits: MediaLimits, budget: int, defaults: MediaDefaults
) -> Medium:
    if isinstance(part, ImagePart):
        return await _read_picture(part, param, limits, budget, defaults.picture)
    if isinstance(part, VideoPart):
        return await _read_clip(part, param, limits, budget, defaults.video)
    return await _read_document(part, param, limits, budget)


async def _read_clip(
    part: VideoPart, param: str, limits: MediaLimits, budget: int, defaults: VideoOptions
) -> Clip:
    video, place = part.video_url, f"{param}.video_url"
    _check_tiles("max_dynamic_patch", video.max_dynamic_patch, place, limits)
    if video.end_s is not None and video.end_s <= (video.start_s or 0):
        text = f"Invalid value for '{place}.end_s': must be behind start_s."
        raise RequestError(text, param=f"{place}.end_s")
    most = max(limits.max_upload_bytes, budget)
    is_url = is_web_url(video.url, f"{place}.url", VIDEO)
    data = b"" if is_url else await decode_data_uri(video.url, f"{place}.url", most, VIDEO)
    return Clip(
        data,
        param,
        f"{place}.url",
        video.max_dynamic_patch,
        video.num_frames or (None if video.fps else defaults.num_frames),
        video.fps or (None if video.num_frames else defaults.fps),
        video.start_s,
        video.end_s,
        await _upload(data, limits, budget),
        video.url if is_url else "",
    )


async def _read_document(
    part: FilePart | InputFilePart, param: str, limits: MediaLimits, budget: int
) -> Document:
    place = f"{param}.file" if isinstance(part, FilePart) else param
    file, most = part.file, max(limits.max_upload_bytes, budget)
    _check_tiles("max_dynamic_patch", file.max_dynamic_patch, place, limits)
    if file.file_data is not None:
        url_param = f"{place}.file_data"
        data = await decode_file_data(file.file_data, url_param, most, DOCUMENT)
    else:
        url, url_param = file.file_url or "", f"{place}.file_url"
        if is_web_url(url, url_param, DOCUMENT):
            return Document(b"", param, url_param, file.max_dynamic_patch, url=url)
        data = await decode_data_uri(url, url_param, most, DOCUMENT)
    upload = await _upload(data, limits, budget)
    return Document(data, param, url_param, file.max_dynamic_patch, upload)


async def _upload(data: bytes, limits: MediaLimits, budget: int) -> bytes:
    """What an upload of the data is named by; nothing where it may go with the request."""
    if len(data) > limits.max_upload_bytes or len(data) <= min(UPLOAD_ABOVE_BYTES, budget):
        return b""
    return (await asyncio.to_thread(hashlib.sha256, data)).digest()


async def _read_picture(
    part: ImagePart, param: str, limits: MediaLimits, budget: int, defaults: MmProcessorKwargs
) -> Picture:
    url_param = f"{param}.image_url.url" if isinstance(part.image_url, ImageUrl) else f"{param}.image_url"
    min_tiles, max_tiles = _tiles(part.image, f"{param}.image_url", limits, defaults)
    is_url = is_web_url(part.image.url, url_param)
    data = b"" if is_url else await decode_data_uri(part.image.url, url_param, budget)
    url = part.image.url if is_url else ""
    thumbnail = part.image.use_thumbnail if part.image.use_thumbnail is not None else defaults.use_thumbnail
    return Picture(data, param, url_param, min_tiles, max_tiles, thumbnail, url)


def _tiles(
    image: ImageUrl, param: str, limits: MediaLimits, defaults: MmProcessorKwargs
) -> tuple[int | None, int | None]:
    """(min_tiles, max_tiles): explicit numbers win over `detail`; None is the checkpoint's default.

    "high" and "original" are that default too: it is the most tiles that the model was trained with.  What
    neither says the request's own defaults say.
    """
    lowest, highest = image.min_dynamic_patch, image.max_dynamic_patch
    _check_tiles("max_dynamic_patch", highest, param, limits)
    _check_tiles("min_dynamic_patch", lowest, param, limits)
    if image.detail == "low":
        lowest, highest = lowest or 1, highest or max(lowest or 1, 1)
    if lowest is not None and highest is not None and lowest > highest:
        raise RequestError(
            f"Invalid value for '{param}.min_dynamic_patch': must be at most the most tiles, {highest}.",
            param=f"{param}.min_dynamic_patch",
        )
    if image.detail in ("high", "original"):
        return lowest, highest
    return _completed(lowest, highest, defaults.min_dynamic_patch, defaults.max_tiles)


def _completed(
    lowest: int | None, highest: int | None, default_lowest: int | None, default_highest: int | None
) -> tuple[int | None, int | None]:
    """A default gives way to what the part itself says at the other end."""
    if highest is None and default_highest is not None:
        highest = max(default_highest, lowest or 1)
    if lowest is None and default_lowest is not None:
        lowest = default_lowest if highest is None else min(default_lowest, highest)
    return lowest, highest


def _check_tiles(name: str, value: int | None, param: str, limits: MediaLimits) -> None:
    if value is not None and limits.max_tiles and value > limits.max_tiles:
        text = f"Invalid value for '{param}.{name}': must be at most {limits.max_tiles}."
        raise RequestError(text, param=f"{param}.{name}")
