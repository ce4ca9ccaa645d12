"""A real HTTP server whose answers are scripted: what the load generator is tested with."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

MODELS = b'{"data":[{"id":"scripted"}]}'


@dataclass
class ScriptedServer:
    """Answers each request with `tokens` events; `fail` says which requests (counted from 0) are refused."""

    tokens: int = 3
    pause_s: float = 0.0
    fail: Callable[[int], bool] = lambda number: False
    hang_up: Callable[[int], bool] = lambda number: False
    bodies: list[dict[str, Any]] = field(default_factory=list)
    connections: int = 0
    open_now: int = 0
    most_open: int = 0

    @asynccontextmanager
    async def listening(self) -> AsyncGenerator[str]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if head.startswith(b"GET /v1/models "):
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(MODELS), MODELS))
                    continue
                assert head.startswith(b"POST /v1/chat/completions HTTP/1.1\r\n"), head
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                body = json.loads(await reader.readexactly(length))
                self.open_now += 1
                self.most_open = max(self.most_open, self.open_now)
                await self._answer(writer, body)
                self.open_now -= 1
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        number = len(self.bodies)
        self.bodies.append(body)
        if self.fail(number):
            writer.write(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 4\r\n\r\nbusy")
            return
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(self.tokens):
            await asyncio.sleep(self.pause_s)
            self._send(writer, {"choices": [{"index": 0, "delta": {"content": "word"}}]})
        if self.hang_up(number):
            writer.close()
            return
        usage = {"prompt_tokens": 11, "completion_tokens": self.tokens}
        self._send(writer, {"choices": [], "usage": usage})
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

    def _send(self, writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
        data = f"data: {json.dumps(event, separators=(',', ':'))}\n\n".encode()
        writer.write(b"%x\r\n%b\r\n" % (len(data), data))
