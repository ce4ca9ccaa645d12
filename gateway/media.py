"""Data URIs of pictures to bytes, within limits.  Never opens a URL or a file, never decodes pixels."""

from __future__ import annotations

import asyncio
import binascii

import pybase64

from gateway.errors import RequestError

MEDIA_TYPES = frozenset(f"image/{name}" for name in ("jpeg", "jpg", "png", "webp", "gif", "bmp", "tiff"))
# Longer ones are decoded in a thread, so that other streams do not stall.
THREAD_THRESHOLD_CHARS = 1 << 20
_MAX_HEADER_CHARS = 128


async def decode_data_uri(uri: str, param: str, max_bytes: int) -> bytes:
    """Bytes of `data:image/...;base64,...`.

    Raises:
        RequestError: names `param`; not a data URI, not a picture, bad base64, or more than `max_bytes`.
    """
    start = _payload_start(uri, param)
    if start == len(uri):
        raise RequestError(f"'{param}' holds no picture.", code="empty_image_file", param=param)
    if (len(uri) - start) // 4 * 3 - 2 > max_bytes:
        message = f"'{param}' is too large: {max_bytes} bytes are left for the pictures of this request."
        raise RequestError(message, code="image_file_too_large", param=param)
    if len(uri) > THREAD_THRESHOLD_CHARS:
        return await asyncio.to_thread(_decode, uri, start, param)
    return _decode(uri, start, param)


def _payload_start(uri: str, param: str) -> int:
    if uri[:5].lower() != "data:":
        message = (
            f"'{param}' must be a data URI such as data:image/jpeg;base64,...; "
            "fetching http(s) URLs and reading files are not enabled on this server."
        )
        raise RequestError(message, code="invalid_image_url", param=param)
    comma = uri.find(",", 5, 5 + _MAX_HEADER_CHARS)
    media_type, *options = uri[5:comma].lower().split(";")
    if comma < 0 or "base64" not in options:
        message = f"'{param}' must be a base64 data URI such as data:image/jpeg;base64,..."
        raise RequestError(message, code="invalid_image_url", param=param)
    if media_type not in MEDIA_TYPES:
        message = f"'{param}' has an unsupported media type; use one of {', '.join(sorted(MEDIA_TYPES))}."
        raise RequestError(message, code="unsupported_image_media_type", param=param)
    return comma + 1


def _decode(uri: str, start: int, param: str) -> bytes:
    try:
        return pybase64.b64decode(uri[start:], validate=True)
    except (binascii.Error, ValueError):  # ValueError: characters beyond ASCII
        message = f"'{param}' is not valid base64."
        raise RequestError(message, code="invalid_base64_image", param=param) from None
