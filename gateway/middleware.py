"""What happens around every request: its id, its count, its line in the log, and what a bug looks like."""

from __future__ import annotations

import logging
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.errors import ANTHROPIC_ROOT, INTERNAL_MESSAGE, error_response
from gateway.metrics import GatewayMetrics
from protos.errors import ModelError
from protos.request_context import REQUEST_ID_KEY, accept_request_id

# What Anthropic's clients read, on the paths of its API.
ANTHROPIC_ID_KEY = "request-id"

log = logging.getLogger(__name__)


class RequestMiddleware:
    """Accepts or makes `x-request-id` and echoes it.  Plain ASGI, so that disconnects pass through."""

    def __init__(self, app: ASGIApp, metrics: GatewayMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = accept_request_id(Headers(scope=scope).get(REQUEST_ID_KEY))
        scope.setdefault("state", {})["request_id"] = request_id
        status, start = 0, time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID_KEY] = request_id
                if scope["path"].startswith(ANTHROPIC_ROOT):
                    headers[ANTHROPIC_ID_KEY] = request_id
            await send(message)

        with self._metrics.in_flight.track_inprogress():
            try:
                await self._app(scope, receive, send_with_id)
            except Exception:
                if status:  # uvicorn logs it and closes the connection
                    raise
                log.exception("unexpected error in request %s", request_id)
                await error_response(ModelError(INTERNAL_MESSAGE), scope)(scope, receive, send_with_id)
            finally:
                self._count(scope, status, time.perf_counter() - start)

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        # The path itself is the client's choice: as a label it would grow without bound.
        route = getattr(scope.get("route"), "path", "other")
        self._metrics.requests.labels(route, str(status)).inc()
        disconnected = status == 499 or "disconnected" in scope["state"]
        if disconnected:
            self._metrics.disconnects.inc()
        end = " disconnected" if disconnected else ""
        request_id = scope["state"]["request_id"]
        log.info("%s %s %d %.3fs %s%s", scope["method"], route, status, seconds, request_id, end)
