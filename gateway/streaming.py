"""Server-sent events over ASGI.  Knows nothing about what they say."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gateway.disconnect import until_disconnect
from gateway.errors import ClientDisconnected

KEEPALIVE = b": keepalive\n\n"
DONE = b"data: [DONE]\n\n"


def sse(data: str) -> bytes:
    """One event; `data` is a single line."""
    return f"data: {data}\n\n".encode()


def sse_json(value: Any) -> bytes:
    return sse(json.dumps(value, separators=(",", ":")))


def named_sse(name: str, value: Any) -> bytes:
    """An event with a name, which `value` repeats as its type."""
    return f"event: {name}\n".encode() + sse_json({"type": name, **value})


class EventStreamResponse(Response):
    """Sends what `events` yields.  Headers wait for the first; errors raised before are HTTP statuses.

    `events` is closed as soon as the client goes away.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        # The length of the body is not known.
        del self.headers["content-length"]
        self._events = events
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._run(send))
        except ClientDisconnected:
            if not self._started:
                raise
            # Too late for a status; the middleware counts it.
            scope["state"]["disconnected"] = True

    async def _run(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            async for data in events:
                if not self._started:
                    self._started = True
                    start = {"status": self.status_code, "headers": self.raw_headers}
                    await send({"type": "http.response.start", **start})
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
