"""Server-sent events over ASGI: when headers leave, and what a client that goes away ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator

import pytest
from starlette.types import Message, Scope

from gateway.errors import ClientDisconnected
from gateway.streaming import EventStreamResponse, sse_json
from protos.errors import Overloaded


class Client:
    """Keeps what it is sent; goes away once `leave` is set."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.leave = asyncio.Event()
        self.scope: Scope = {"type": "http", "state": {}}

    async def receive(self) -> Message:
        await self.leave.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    async def get(self, events: AsyncGenerator[bytes, None]) -> None:
        await EventStreamResponse(events)(self.scope, self.receive, self.send)


class Events:
    """Yields `data`, then waits until it is closed."""

    def __init__(self, *data: bytes) -> None:
        self._data = data
        self.waits = asyncio.Event()
        self.closed = False

    async def stream(self) -> AsyncGenerator[bytes, None]:
        try:
            for data in self._data:
                yield data
            self.waits.set()
            await asyncio.Event().wait()
        finally:
            self.closed = True


def test_an_event_is_one_line_of_json() -> None:
    data = sse_json({"text": "a\n\nb\u2028"})
    assert data.startswith(b"data: {") and data.endswith(b"}\n\n")
    assert len(data.decode().splitlines()) == 2
    assert json.loads(data.removeprefix(b"data: ")) == {"text": "a\n\nb\u2028"}


async def test_every_event_leaves_on_its_own_behind_headers_that_forbid_buffering() -> None:
    async def events() -> AsyncGenerator[bytes, None]:
        yield b"one"
        yield b"two"

    client = Client()
    await client.get(events())
    start, *bodies = client.sent
    headers = {name.decode(): value.decode() for name, value in start["headers"]}
    assert start["status"] == 200 and headers["content-type"].startswith("text/event-stream")
    assert (headers["cache-control"], headers["x-accel-buffering"]) == ("no-cache", "no")
    assert "content-length" not in headers
    assert [(body["body"], body["more_body"]) for body in bodies] == [
        (b"one", True),
        (b"two", True),
        (b"", False),
    ]


async def test_an_error_before_the_first_event_leaves_the_status_open() -> None:
    async def events() -> AsyncGenerator[bytes, None]:
        raise Overloaded("queue full")
        yield b""

    client = Client()
    with pytest.raises(Overloaded):
        await client.get(events())
    assert client.sent == []


async def test_leaving_before_the_first_event_is_an_error_that_has_a_status() -> None:
    client, events = Client(), Events()
    getting = asyncio.create_task(client.get(events.stream()))
    await events.waits.wait()
    client.leave.set()
    with pytest.raises(ClientDisconnected):
        await getting
    assert events.closed and client.sent == [] and client.scope["state"] == {}


async def test_leaving_later_closes_the_events_and_tells_the_middleware() -> None:
    client, events = Client(), Events(b"one")
    getting = asyncio.create_task(client.get(events.stream()))
    await events.waits.wait()
    client.leave.set()
    await getting
    assert events.closed and client.scope["state"] == {"disconnected": True}
    assert client.sent[-1]["more_body"], "an answer that broke off does not look finished"
