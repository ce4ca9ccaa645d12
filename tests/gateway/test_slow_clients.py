"""Connections that cost and do not ask: each is ended, and others are answered meanwhile."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator

import pytest

from gateway.config import GatewayConfig
from protos import language_model_pb2 as pb
from tests.gateway.scripted import ask, delta, gateway_before, started

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


async def ended(reader: asyncio.StreamReader, seconds: float = 3) -> bytes:
    async with asyncio.timeout(seconds):
        try:
            return await reader.read()
        except ConnectionError:
            return b""


@pytest.mark.parametrize("sent", [b"", b"GET /health", b"GET /health HTTP/1.1\r\nx: "])
async def test_headers_have_a_deadline_however_they_trickle(sent: bytes) -> None:
    async with gateway_before(config=GatewayConfig(header_timeout_s=0.3)) as gateway:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(sent)
        start = time.monotonic()
        trickle = asyncio.create_task(_trickle(writer) if sent else asyncio.sleep(0))
        assert await ended(reader) == b""
        assert time.monotonic() - start < 2
        trickle.cancel()
        writer.close()
        assert (await gateway.http.get("/health")).status_code == 200


async def _trickle(writer: asyncio.StreamWriter) -> None:
    while not writer.is_closing():
        writer.write(b"a")
        await asyncio.sleep(0.05)


async def test_the_next_request_of_a_connection_has_the_same_deadline() -> None:
    async with gateway_before(config=GatewayConfig(header_timeout_s=0.3)) as gateway:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        await reader.readuntil(b"}")
        await asyncio.sleep(0.4)  # longer than the deadline: there is no next request yet
        writer.write(b"GET /health HTTP/1.1\r\n")
        assert await ended(reader) == b""
        writer.close()


async def test_headers_without_an_end_are_cut_off() -> None:
    async with gateway_before() as gateway:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(b"GET /health HTTP/1.1\r\n" + b"x: y\r\n" * 20_000)
        assert await ended(reader) == b""
        writer.close()


@pytest.mark.parametrize("piece", [b"x: y\r\n", b"x"])
async def test_trailers_without_an_end_are_cut_off(piece: bytes) -> None:
    async with gateway_before() as gateway:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(HEAD + b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n" + piece * (1 << 20))
        assert await ended(reader) == b""
        writer.close()


async def test_a_chunk_that_only_describes_itself_is_cut_off() -> None:
    async with gateway_before() as gateway:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(HEAD + b"transfer-encoding: chunked\r\n\r\n1;" + b"x" * (1 << 20))
        assert await ended(reader) == b""
        writer.close()


async def test_a_body_in_tiny_chunks_with_trailers_is_read() -> None:
    body = json.dumps(ask()).encode()
    chunks = b"".join(b"1;a=b\r\n%c\r\n" % byte for byte in body)
    async with gateway_before() as gateway:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        head = HEAD + b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n"
        writer.write(head + chunks + b"0\r\nx: y\r\n\r\n")
        assert (await ended(reader)).startswith(b"HTTP/1.1 200 ")
        writer.close()


@pytest.mark.parametrize("size", [100_000, 3_000_000])
async def test_a_large_body_is_no_header(size: int) -> None:
    async with gateway_before() as gateway:
        for _ in range(2):  # on one connection
            assert (await gateway.post(ask("a" * size))).status_code == 200


NOT_HTTP = {
    "another protocol": b"\x16\x03\x01\x02\x00\x01\r\n\r\n",
    "two lengths": HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\n{}",
    "a length and chunks": HEAD + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "an unknown coding": HEAD + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
    "a negative length": HEAD + b"content-length: -5\r\n\r\n",
    "a path beyond ASCII": b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
}


@pytest.mark.parametrize("case", NOT_HTTP)
async def test_what_is_no_http_gets_an_error_like_any_other(case: str) -> None:
    async with gateway_before() as gateway:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(NOT_HTTP[case])
        head, _, body = (await ended(reader)).partition(b"\r\n\r\n")
        writer.close()
        assert not gateway.llm.requests
    lines = head.lower().split(b"\r\n")
    assert lines[0] == b"http/1.1 400 bad request" and b"content-type: application/json" in lines
    assert any(re.fullmatch(rb"x-request-id: [0-9a-f]{32}", line) for line in lines)
    error = json.loads(body)["error"]
    assert (error["code"], error["param"], error["type"]) == ("invalid_http", None, "invalid_request_error")


async def test_a_body_that_trickles_has_a_deadline() -> None:
    async with gateway_before(config=GatewayConfig(body_timeout_s=0.3)) as gateway:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(HEAD + b"content-length: 1000\r\n\r\n{")
        trickle = asyncio.create_task(_trickle(writer))
        answer = await ended(reader)
        trickle.cancel()
        assert answer.startswith(b"HTTP/1.1 408 ")
        writer.close()


async def test_a_stream_that_nobody_reads_ends_with_its_generation() -> None:
    async def endless(_request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield started()
        while True:
            yield delta("a" * 10_000)
            await asyncio.sleep(0)

    async with gateway_before(endless, config=GatewayConfig(write_timeout_s=0.3)) as gateway:
        body = json.dumps(ask(stream=True)).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port, limit=1024)
        writer.write(HEAD + f"content-length: {len(body)}\r\n\r\n".encode() + body)
        await reader.readexactly(100)
        writer.transport.pause_reading()
        async with asyncio.timeout(10):
            await gateway.llm.cancelled.wait()
        writer.transport.abort()
        assert (await gateway.http.get("/health")).status_code == 200
