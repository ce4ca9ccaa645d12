"""The body of a request, read under a limit of size and time."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect, Request

from gateway.errors import ClientDisconnected, RequestError


async def read_json_body(request: Request, max_bytes: int, timeout_s: float) -> bytes:
    """The raw bytes, which claim to be JSON.

    Raises:
        RequestError: 413 before anything is read where Content-Length says enough, 415, 408.
    """
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        message = "The request body must not be compressed."
        raise RequestError(message, code="unsupported_media_type", status=415)
    content_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        message = "The content type must be application/json."
        raise RequestError(message, code="unsupported_media_type", status=415)
    if int(request.headers.get("content-length", 0)) > max_bytes:
        raise _too_large(max_bytes)
    try:
        async with asyncio.timeout(timeout_s):
            return await _read(request, max_bytes)
    except TimeoutError:
        raise RequestError("The request body took too long.", code="timeout", status=408) from None
    except ClientDisconnect:
        raise ClientDisconnected from None


async def _read(request: Request, max_bytes: int) -> bytes:
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > max_bytes:
            raise _too_large(max_bytes)
        chunks.append(chunk)
    return b"".join(chunks)


def _too_large(max_bytes: int) -> RequestError:
    message = f"The request body is larger than {max_bytes} bytes."
    return RequestError(message, code="request_too_large", status=413)
