"""A keep-alive HTTP/1.1 connection that carries one chat completion at a time.  Knows nothing about JSON."""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast
from urllib.parse import urlsplit

from deploy.bench.answer import Answer

PATH = "/chat/completions"


class Connection(asyncio.Protocol):
    """Made by `connect`; never used again after a failure."""

    def __init__(self, host: str, path: str) -> None:
        self._head = (
            f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
            "accept: */*\r\nauthorization: Bearer x\r\ncontent-length: "
        ).encode()
        self._transport: asyncio.Transport
        self._answer: Answer | None = None
        self._completed: asyncio.Future[None] | None = None

    @property
    def usable(self) -> bool:
        return not self._transport.is_closing()

    async def post(self, body: bytes, answer: Answer) -> None:
        """Send one request and return when `answer` is complete.

        Raises:
            AnswerError, OSError: refused or failed, or the connection was lost.
        """
        self._answer = answer
        self._completed = asyncio.get_running_loop().create_future()
        self._transport.writelines((self._head + b"%d\r\n\r\n" % len(body), body))
        try:
            await self._completed
        finally:
            self._answer = None

    def close(self) -> None:
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if self._answer is not None:
            self._settle(lambda answer: answer.feed(data, now))

    def connection_lost(self, error: Exception | None) -> None:
        if self._answer is not None:
            self._settle(lambda answer: answer.end())
        if self._completed is not None and not self._completed.done():
            self._completed.set_exception(error or ConnectionResetError("the server closed the connection"))

    def _settle(self, step: Any) -> None:
        assert self._answer is not None and self._completed is not None
        if self._completed.done():
            return
        try:
            if step(self._answer):
                self._completed.set_result(None)
        except Exception as error:  # whatever the bytes were, the request that waits for them fails
            self._completed.set_exception(error)


async def connect(base_url: str) -> Connection:
    """Connect to the server of an OpenAI base URL ("http://127.0.0.1:8000/v1").  Raises OSError."""
    url = urlsplit(base_url)
    assert url.scheme == "http" and url.hostname is not None, base_url
    path = url.path.rstrip("/") + PATH
    _, connection = await asyncio.get_running_loop().create_connection(
        lambda: Connection(url.netloc, path), url.hostname, url.port or 80
    )
    return connection
