"""Ends connections that only cost: headers that do not come, or are too many, and answers that nobody reads.

What is no HTTP gets an error like any other. A slow body has a limit of its own where it is read
(`gateway/body.py`).
"""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.errors import RequestError, error_body
from protos.request_context import REQUEST_ID_KEY, accept_request_id

# Of headers and trailers; of a body, what comes between two pieces of it.
MAX_HEADER_BYTES = 64 << 10


class GuardedProtocol(HttpToolsProtocol):
    def __init__(self, *args: Any, header_timeout_s: float, write_timeout_s: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_timeout_s = header_timeout_s
        self._write_timeout_s = write_timeout_s
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._bytes_aside = 0  # that came since the last of a body, or of a message

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers_came()
        self._reads_again()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._bytes_aside += len(data)
        super().data_received(data)
        if self._bytes_aside > MAX_HEADER_BYTES:
            self.transport.abort()

    def on_body(self, body: bytes) -> None:
        self._bytes_aside = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._bytes_aside = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """`msg` is uvicorn's text, which it has logged."""
        error = RequestError("The request is not valid HTTP.", code="invalid_http")
        body = json.dumps(error_body(error))
        lines = [
            "HTTP/1.1 400 Bad Request",
            "content-type: application/json",
            f"content-length: {len(body)}",
            "connection: close",
            f"{REQUEST_ID_KEY}: {accept_request_id(None)}",
        ]
        self.transport.write("\r\n".join([*lines, "", body]).encode())
        self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._await_headers()

    def on_headers_complete(self) -> None:
        self._headers_came()
        super().on_headers_complete()

    def pause_writing(self) -> None:
        """What we send piles up: it has to flow again within some time."""
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self._write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._reads_again()
        super().resume_writing()

    def _await_headers(self) -> None:
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(self._header_timeout_s, self.transport.abort)

    def _headers_came(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _reads_again(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


def guarded(header_timeout_s: float, write_timeout_s: float) -> Any:
    """What makes a protocol for uvicorn, which calls it as it calls its own class."""
    return partial(GuardedProtocol, header_timeout_s=header_timeout_s, write_timeout_s=write_timeout_s)
