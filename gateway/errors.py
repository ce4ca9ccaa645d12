"""Errors in OpenAI's shape, and the one table from `ServingError` to HTTP."""

from __future__ import annotations

import asyncio
import logging
import math
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from protos.errors import (
    Cancelled,
    ContextLengthExceeded,
    DeadlineExceeded,
    FingerprintMismatch,
    InvalidRequest,
    ModelError,
    NotFound,
    Overloaded,
    ServingError,
    Unavailable,
)

# Longer waits make the official client give up instead of waiting.
MAX_RETRY_AFTER_S = 120
# How long and how much of a refused body is still read.
LINGER_S = 2.0
LINGER_BYTES = 256 << 20
ANTHROPIC_ROOT = "/v1/messages"
# Anthropic's client then sends the whole conversation instead of what is new of it.
THREAD_UNSUPPORTED = "thread_unsupported_request"
INTERNAL_MESSAGE = "The server failed to answer this request; its log has the details under the request id."

log = logging.getLogger(__name__)


class RequestError(InvalidRequest):
    """A fault of the request that the gateway itself found; `field` is a path into the JSON body."""

    def __init__(
        self, message: str, *, code: str = "invalid_value", param: str | None = None, status: int = 400
    ) -> None:
        super().__init__(message, field=param)
        self.error_code = code
        self.status = status


class Unauthorized(InvalidRequest):
    """No key, or one that is not known: the same to whoever asks."""

    def __init__(self) -> None:
        super().__init__(
            "Incorrect API key provided. Send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'."
        )


class RateLimited(Overloaded):
    """The caller's own limit, not the server's."""

    def __init__(self, limit: str, retry_after_s: float) -> None:
        super().__init__(f"Rate limit reached for this API key: {limit}.", retry_after_s=retry_after_s)


class ModelNotFound(NotFound):
    """The id that the request names is not served."""

    def __init__(self, model: str) -> None:
        super().__init__(f"The model '{model[:200]}' does not exist.", field="model")


class ClientDisconnected(Cancelled):
    """The HTTP client went away; nobody reads the answer."""

    def __init__(self) -> None:
        super().__init__("The client closed the connection.")


class AnswerBrokeOff(ModelError):
    """The language model's events ended before the answer did."""

    def __init__(self) -> None:
        super().__init__("the language model ended an answer without finishing it")


@dataclass(frozen=True)
class HttpForm:
    """How a class of errors looks over HTTP."""

    status: int
    type: str
    code: str
    retry: bool | None = None  # x-should-retry; None leaves the choice to the client


_INVALID = "invalid_request_error"
# Deterministic failures must say so, or the official client runs each bad request three times.
_FORMS: dict[type[ServingError], HttpForm] = {
    ContextLengthExceeded: HttpForm(400, _INVALID, "context_length_exceeded"),
    InvalidRequest: HttpForm(400, _INVALID, "invalid_value"),
    NotFound: HttpForm(404, _INVALID, "model_not_found"),
    Unauthorized: HttpForm(401, "authentication_error", "invalid_api_key", retry=False),
    RateLimited: HttpForm(429, "rate_limit_error", "rate_limit_exceeded"),
    Overloaded: HttpForm(429, "overloaded_error", "overloaded"),
    Unavailable: HttpForm(503, "server_error", "service_unavailable"),
    FingerprintMismatch: HttpForm(503, "server_error", "service_unavailable", retry=False),
    DeadlineExceeded: HttpForm(504, "server_error", "timeout", retry=False),
    Cancelled: HttpForm(499, "server_error", "request_cancelled"),
    ModelError: HttpForm(500, "server_error", "internal_error", retry=False),
}
_HTTP_CODES = {404: "unknown_url", 405: "method_not_allowed"}


def form_of(error: ServingError) -> HttpForm:
    if isinstance(error, RequestError):
        return HttpForm(error.status, _INVALID, error.error_code)
    return next((_FORMS[cls] for cls in type(error).__mro__ if cls in _FORMS), _FORMS[ModelError])


def error_body(error: ServingError) -> dict[str, Any]:
    """`{"error": {message, type, param, code}}`, all four keys always there."""
    form = form_of(error)
    message = INTERNAL_MESSAGE if isinstance(error, ModelError) else error.message
    return {"error": {"message": message, "type": form.type, "param": error.field, "code": form.code}}


_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def anthropic_error(error: ServingError) -> dict[str, Any]:
    """`{"type": "error", "error": {type, message}}`, the shape of Anthropic's API."""
    status = form_of(error).status
    kind = _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    described: dict[str, Any] = {"type": kind, "message": error_body(error)["error"]["message"]}
    if form_of(error).code == THREAD_UNSUPPORTED:
        described["details"] = {"error_code": THREAD_UNSUPPORTED, "unsupported": ["thread"]}
    return {"type": "error", "error": described}


class UnreadBodyResponse(JSONResponse):
    """Answers at once and closes, but first lets the client finish sending.

    Closing with unread bytes resets the connection, and most clients then never see the answer.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.headers["connection"] = "close"
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                await _discard(receive, LINGER_BYTES)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _discard(receive: Receive, max_bytes: int) -> None:
    message = await receive()
    while message["type"] == "http.request" and message.get("more_body") and max_bytes > 0:
        max_bytes -= len(message.get("body", b""))
        message = await receive()


def error_response(error: ServingError, scope: Scope | None = None) -> JSONResponse:
    """In the shape of the API that the request's path belongs to; without one, OpenAI's."""
    body = error_body(error)
    if scope is not None and scope["path"].startswith(ANTHROPIC_ROOT):
        body = {**anthropic_error(error), "request_id": scope["state"]["request_id"]}
    form = form_of(error)
    headers = {}
    if isinstance(error, Overloaded | Unavailable):
        wait_s = math.ceil(error.retry_after_s if error.retry_after_s is not None else 1)
        headers["retry-after"] = str(min(max(wait_s, 1), MAX_RETRY_AFTER_S))
    if form.retry is not None:
        headers["x-should-retry"] = str(form.retry).lower()
    if form.status == 408:
        headers["connection"] = "close"  # the rest of the body may never come
    if form.status == 401:
        headers["www-authenticate"] = "Bearer"
    if form.status in (401, 413):
        return UnreadBodyResponse(body, form.status, headers)
    return JSONResponse(body, form.status, headers)


async def on_serving_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServingError)
    if isinstance(error, ModelError):
        log.error("request failed: %s", error.message)
    return error_response(error, request.scope)


async def on_http_exception(request: Request, error: Exception) -> JSONResponse:
    """404 and 405 of the router."""
    assert isinstance(error, HTTPException)
    route = f"{request.method} {request.url.path[:200]}"
    message = f"Unknown URL: {route}" if error.status_code == 404 else f"Method not allowed: {route}"
    code = _HTTP_CODES.get(error.status_code, "invalid_value")
    response = error_response(RequestError(message, code=code, status=error.status_code), request.scope)
    response.headers.update(error.headers or {})
    return response
