"""One HTTP/1.1 connection of a client that may pause, stop reading or leave.  Knows nothing about JSON."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass

MAX_HEAD_BYTES = 1 << 16


@dataclass(frozen=True)
class Head:
    status: int
    headers: dict[str, str]  # names in lower case


class HttpConnection:
    """Made by `open`; whoever made it leaves it by `close` or `abort`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._is_closed = False

    @classmethod
    async def open(cls, host: str, port: int, receive_bytes: int = 0) -> HttpConnection:
        """`receive_bytes`: how little the kernel may hold for a client that does not read; 0: its default."""
        sock = socket.socket()
        try:
            sock.setblocking(False)
            if receive_bytes:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
            await asyncio.get_running_loop().sock_connect(sock, (host, port))
            return cls(*await asyncio.open_connection(sock=sock, limit=receive_bytes or MAX_HEAD_BYTES))
        except BaseException:
            sock.close()
            raise

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def read_head(self) -> Head:
        """Raises ConnectionError, asyncio.IncompleteReadError."""
        status_line, *lines = (await self._reader.readuntil(b"\r\n\r\n"))[:-4].decode("latin-1").split("\r\n")
        fields = (line.partition(":") for line in lines)
        return Head(int(status_line.split()[1]), {name.lower(): value.strip() for name, _, value in fields})

    async def pieces(self, head: Head) -> AsyncIterator[bytes]:
        """The body as it comes.  Raises ConnectionError, asyncio.IncompleteReadError when it is cut."""
        if head.headers.get("transfer-encoding", "").lower() == "chunked":
            while size := int((await self._reader.readuntil(b"\r\n")).split(b";")[0], 16):
                yield (await self._reader.readexactly(size + 2))[:-2]
            await self._reader.readuntil(b"\r\n")
        elif "content-length" in head.headers:
            yield await self._reader.readexactly(int(head.headers["content-length"]))
        else:
            yield await self._reader.read()

    async def read_body(self, head: Head) -> bytes:
        return b"".join([piece async for piece in self.pieces(head)])

    async def read_end(self) -> bytes:
        """What comes until the server closes."""
        return await self._reader.read()

    def abort(self) -> None:
        """Leave with a reset, whatever is on its way."""
        if not self._is_closed:
            self._is_closed = True
            self._writer.transport.abort()

    async def close(self) -> None:
        self._writer.close()
        with suppress(ConnectionError):  # the server was first
            await self._writer.wait_closed()
        self._is_closed = True


def request_bytes(
    body: bytes,
    path: str = "/v1/chat/completions",
    method: str = "POST",
    content_type: str = "application/json",
) -> bytes:
    """A whole request as it goes over the wire."""
    head = f"{method} {path} HTTP/1.1\r\nhost: soak\r\ncontent-type: {content_type}\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
