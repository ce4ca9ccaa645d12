"""A body is read up to its limits of kind, size and time, and not a byte further."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import pytest
from starlette.requests import Request
from starlette.types import Message

from gateway.body import read_json_body
from gateway.errors import ClientDisconnected, RequestError


class Client:
    """Sends these chunks, then says nothing more."""

    def __init__(self, chunks: Iterable[bytes] = (), *, ends: bool = True, pause_s: float = 0) -> None:
        parts = list(chunks)
        self._pause_s = pause_s
        self.messages: list[Message] = [
            {"type": "http.request", "body": part, "more_body": not ends or index < len(parts) - 1}
            for index, part in enumerate(parts)
        ]

    async def receive(self) -> Message:
        await asyncio.sleep(self._pause_s)
        if not self.messages:
            await asyncio.Event().wait()
        return self.messages.pop(0)


async def read(client: Client, max_bytes: int = 10, timeout_s: float = 5, **headers: str) -> bytes:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": "/", "headers": raw}
    return await read_json_body(Request(scope, client.receive), max_bytes, timeout_s)


async def refusal(client: Client, max_bytes: int = 10, timeout_s: float = 5, **headers: str) -> int:
    with pytest.raises(RequestError) as caught:
        await read(client, max_bytes, timeout_s, **headers)
    return caught.value.status


async def test_chunks_are_joined_up_to_exactly_the_limit() -> None:
    assert await read(Client([b"01234", b"", b"56789"])) == b"0123456789"


async def test_one_byte_more_is_refused_and_the_rest_is_left_unread() -> None:
    client = Client([b"0123456789", b"x", b"never read"])
    assert await refusal(client, content_length="5") == 413, "what Content-Length says is not believed"
    assert [message["body"] for message in client.messages] == [b"never read"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content_length": "11"}, 413),
        ({"content_type": "text/json"}, 415),
        ({"content_type": ""}, 415),
        ({"content_encoding": "gzip"}, 415),
        ({"content_encoding": "identity, br"}, 415),
    ],
)
async def test_what_the_headers_decide_is_refused_before_anything_is_read(
    headers: dict[str, str], status: int
) -> None:
    client = Client([b"{}"])
    assert await refusal(client, **headers) == status
    assert len(client.messages) == 1


@pytest.mark.parametrize(
    "kind", ["Application/JSON", "application/json ;charset=utf-8", "application/x+json"]
)
async def test_spellings_of_json_are_accepted(kind: str) -> None:
    assert await read(Client([b"{}"]), content_type=kind) == b"{}"


async def test_the_time_limit_holds_for_the_whole_body_and_not_for_each_chunk() -> None:
    client = Client([b"x"] * 10, pause_s=0.05)
    assert await refusal(client, timeout_s=0.12) == 408
    assert len(client.messages) > 5


async def test_a_client_that_leaves_while_it_sends_is_gone_and_not_at_fault() -> None:
    client = Client([b"{"], ends=False)
    client.messages.append({"type": "http.disconnect"})
    with pytest.raises(ClientDisconnected):
        await read(client)
