"""A web server on loopback that answers as a test wants, and an internet in which it has every address."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from encoder_service.fetch_limits import FetchLimits
from encoder_service.media_fetcher import Connection, MediaFetcher
from encoder_service.public_address import Address

HOST, ADDRESS = "media.example.org", "93.184.215.14"
URL = f"https://{HOST}/a.png"

Answer = Callable[[asyncio.StreamWriter], Coroutine[None, None, None]]


@dataclass
class Internet:
    """`answers` by path; a name has the addresses of `names`, or the next ones of `changing`."""

    answers: dict[str, Answer | bytes] = field(default_factory=dict)
    names: dict[str, Sequence[str]] = field(default_factory=lambda: {HOST: [ADDRESS]})
    changing: dict[str, list[Sequence[str]]] = field(default_factory=dict)
    requests: list[bytes] = field(default_factory=list)  # heads
    resolved: list[str] = field(default_factory=list)
    connected: list[tuple[str, int, str | None]] = field(default_factory=list)
    unreachable: set[str] = field(default_factory=set)
    open_connections: int = 0
    port: int = 0

    async def resolve(self, host: str) -> Sequence[str]:
        self.resolved.append(host)
        if host in self.changing:
            return self.changing[host].pop(0)
        if host not in self.names:
            raise OSError("no such name")
        return self.names[host]

    async def connect(self, address: Address, port: int, tls_name: str | None) -> Connection:
        self.connected.append((str(address), port, tls_name))
        if str(address) in self.unreachable:
            raise ConnectionRefusedError(f"to {address}")
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open_connections += 1
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            self.requests.append(head)
            answer = self.answers[head.split()[1].decode()]
            if isinstance(answer, bytes):
                writer.write(answer)
                await writer.drain()
            else:
                await _until_end(answer(writer), reader)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the fetcher has had enough
        finally:
            self.open_connections -= 1
            writer.close()

    def fetcher(self, **limits: Any) -> MediaFetcher:
        return MediaFetcher(FetchLimits(**{"media_hosts": ("*",), **limits}), self.resolve, self.connect)


@asynccontextmanager
async def internet(**answers: Answer | bytes) -> AsyncIterator[Internet]:
    """Answers by path without its slash.  At the end no connection is left."""
    it = Internet({f"/{name}": answer for name, answer in answers.items()})
    server = await asyncio.start_server(it.serve, "127.0.0.1", 0)
    it.port = server.sockets[0].getsockname()[1]
    try:
        yield it
        async with asyncio.timeout(5):
            while it.open_connections:
                await asyncio.sleep(0.002)
    finally:
        server.close()


async def _until_end(answer: Coroutine[None, None, None], reader: asyncio.StreamReader) -> None:
    """Until it is over, or the other side has gone."""
    tasks = [asyncio.create_task(answer), asyncio.create_task(reader.read())]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def ok(body: bytes, *headers: str) -> bytes:
    lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def status(number: int, *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {number} Whatever", "Content-Length: 0", *headers]).encode() + b"\r\n\r\n"


def redirect(location: str, number: int = 302) -> bytes:
    return status(number, f"Location: {location}")


def forever(start: bytes, piece: bytes, pause_s: float = 0.0) -> Answer:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(start)
        with suppress(ConnectionError):
            while not writer.transport.is_closing():
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(pause_s)

    return answer
