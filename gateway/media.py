"""Data URIs of media to bytes, within limits.  Never opens a URL or a file, never decodes pixels.

URLs go to the encoder as they are: its operator says whether they are fetched.
"""

from __future__ import annotations

import asyncio
import binascii
from dataclasses import dataclass

import pybase64

from gateway.errors import RequestError
from protos.options import MAX_URL_CHARS


@dataclass(frozen=True)
class UriKind:
    """`code` and `file_code` stand in the codes of errors, `example` in their texts."""

    code: str
    file_code: str
    noun: str
    example: str
    media_types: frozenset[str]


PICTURE = UriKind(
    "image",
    "image_file",
    "picture",
    "image/jpeg",
    frozenset(f"image/{name}" for name in ("jpeg", "jpg", "png", "webp", "gif", "bmp", "tiff")),
)
VIDEO = UriKind(
    "video",
    "video_file",
    "video",
    "video/mp4",
    frozenset(f"video/{name}" for name in ("mp4", "quicktime", "webm", "x-matroska", "matroska")),
)
DOCUMENT = UriKind("file", "file", "document", "application/pdf", frozenset({"application/pdf"}))
# Longer ones are decoded in a thread, so that other streams do not stall.  At 20 GB/s, what AVX-512 does, so
# many take 0.2 ms: about as long as the way to a thread and back on a busy machine.
THREAD_THRESHOLD_CHARS = 4 << 20
_MAX_HEADER_CHARS = 128


def is_web_url(text: str, param: str, kind: UriKind = PICTURE) -> bool:
    """Whether an encoder would have to fetch it.

    Raises:
        RequestError: it would, and the text is longer than any that is fetched, or not plain ASCII.
    """
    if not text[:8].lower().startswith(("https://", "http://")):
        return False
    if len(text) > MAX_URL_CHARS or not text.isascii():
        message = f"'{param}' must have at most {MAX_URL_CHARS} characters, all of them ASCII."
        raise RequestError(message, code=f"invalid_{kind.code}_url", param=param)
    return True


async def decode_data_uri(uri: str, param: str, max_bytes: int, kind: UriKind = PICTURE) -> bytes:
    """Bytes of `data:image/...;base64,...`, or of another kind.

    Raises:
        RequestError: names `param`; not a data URI of that kind, bad base64, or more than `max_bytes`.
    """
    return await _decode_within(uri, _payload_start(uri, param, kind), param, max_bytes, kind)


async def decode_file_data(text: str, param: str, max_bytes: int, kind: UriKind) -> bytes:
    """The same for base64 that stands in a data URI or by itself."""
    start = _payload_start(text, param, kind) if ":" in text[:_MAX_HEADER_CHARS] else 0
    return await _decode_within(text, start, param, max_bytes, kind)


async def _decode_within(text: str, start: int, param: str, max_bytes: int, kind: UriKind) -> bytes:
    if start == len(text):
        raise RequestError(f"'{param}' holds no {kind.noun}.", code=f"empty_{kind.file_code}", param=param)
    if (len(text) - start) // 4 * 3 - 2 > max_bytes:
        message = f"'{param}' is too large: {max_bytes} bytes are left for the {kind.noun}s of this request."
        raise RequestError(message, code=f"{kind.file_code}_too_large", param=param)
    if len(text) > THREAD_THRESHOLD_CHARS:
        return await asyncio.to_thread(_decode, text, start, param, kind)
    return _decode(text, start, param, kind)


def _payload_start(uri: str, param: str, kind: UriKind) -> int:
    if uri[:5].lower() != "data:":
        message = (
            f"'{param}' must be a data URI such as data:{kind.example};base64,...; "
            "other than https URLs, where they are enabled, nothing is read from elsewhere."
        )
        raise RequestError(message, code=f"invalid_{kind.code}_url", param=param)
    comma = uri.find(",", 5, 5 + _MAX_HEADER_CHARS)
    media_type, *options = uri[5:comma].lower().split(";")
    if comma < 0 or "base64" not in options:
        message = f"'{param}' must be a base64 data URI such as data:{kind.example};base64,..."
        raise RequestError(message, code=f"invalid_{kind.code}_url", param=param)
    if media_type not in kind.media_types:
        types = ", ".join(sorted(kind.media_types))
        message = f"'{param}' has an unsupported media type; use one of {types}."
        raise RequestError(message, code=f"unsupported_{kind.code}_media_type", param=param)
    return comma + 1


def _decode(text: str, start: int, param: str, kind: UriKind) -> bytes:
    try:
        return pybase64.b64decode(text[start:], validate=True)
    except (binascii.Error, ValueError):  # ValueError: characters beyond ASCII
        message = f"'{param}' is not valid base64."
        raise RequestError(message, code=f"invalid_base64_{kind.code}", param=param) from None
