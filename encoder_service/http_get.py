"""One GET on a connection that somebody else has made, within limits.  Knows no addresses."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Protocol

import h11

MAX_HEADER_BYTES = 16 << 10
READ_BYTES = 64 << 10
# Chunks cost time however small they are: so many are free, of all others the mean must be this large.
FREE_CHUNKS, MIN_CHUNK_BYTES = 4096, 512
REDIRECTS = frozenset({301, 302, 303, 307, 308})


class FetchFailed(Exception):
    """For the log; clients are told nothing of it."""


class TooLarge(Exception):
    """The body has more bytes than its limit."""


class Budget(Protocol):
    def spend(self, num_bytes: int) -> None:
        """Raises TooLarge."""


@dataclass(frozen=True)
class Response:
    body: bytes
    location: str | None  # of a redirect, which has no body


async def get(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    authority: str,
    target: str,
    budget: Budget,
) -> Response:
    """Ask for `target`; the connection is of no use afterwards.

    Raises:
        FetchFailed: neither a redirect nor 200, broken off, encoded, or not HTTP.
        TooLarge: `budget` says so, at the latest when the byte too many has come.
    """
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEADER_BYTES)
    headers = [
        ("Host", authority),
        ("User-Agent", "tessera"),
        ("Accept", "*/*"),
        ("Accept-Encoding", "identity"),  # nothing that grows here
        ("Connection", "close"),
    ]
    request = h11.Request(method="GET", target=target, headers=headers)
    writer.write(connection.send(request) or b"")
    writer.write(connection.send(h11.EndOfMessage()) or b"")
    try:
        await writer.drain()
        return await _read_response(connection, reader, budget)
    except h11.RemoteProtocolError as error:
        raise FetchFailed(f"not HTTP: {error}") from None
    except OSError as error:
        raise FetchFailed(f"broken off: {type(error).__name__}") from None


async def _read_response(
    connection: h11.Connection, reader: asyncio.StreamReader, budget: Budget
) -> Response:
    body = bytearray()
    num_chunks = 0
    while True:
        event = await _next_event(connection, reader)
        if isinstance(event, h11.Response):
            location = _read_head(event, budget)
            if location is not None:
                return Response(b"", location)
        elif isinstance(event, h11.Data):
            budget.spend(len(event.data))
            body += event.data
            num_chunks += 1
            if num_chunks > FREE_CHUNKS + len(body) // MIN_CHUNK_BYTES:
                raise FetchFailed("the body comes in tiny chunks")
        elif isinstance(event, h11.EndOfMessage):
            return Response(bytes(body), None)
        elif not isinstance(event, h11.InformationalResponse):
            raise FetchFailed("broken off")


async def _next_event(connection: h11.Connection, reader: asyncio.StreamReader) -> object:
    while (event := connection.next_event()) is h11.NEED_DATA:
        connection.receive_data(await reader.read(READ_BYTES))
        await asyncio.sleep(0)  # a read that finds bytes does not let others run
    return event


def _read_head(response: h11.Response, budget: Budget) -> str | None:
    """The location of a redirect."""
    headers = dict(response.headers)
    if response.status_code in REDIRECTS:
        return _ascii(headers.get(b"location", b""))
    if response.status_code != 200:
        raise FetchFailed(f"status {response.status_code}")
    if headers.get(b"content-encoding", b"identity").strip().lower() != b"identity":
        raise FetchFailed("an encoded body")
    announced = int(headers.get(b"content-length", b"0"))  # h11 has checked it
    budget.spend(announced)
    budget.spend(-announced)
    return None


def _ascii(location: bytes) -> str:
    if not location or not all(0x21 <= byte <= 0x7E for byte in location):
        raise FetchFailed("a redirect without a plain location")
    return location.decode("ascii")
