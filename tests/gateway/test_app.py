"""Routes, limits and the life of the server."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
from collections.abc import AsyncIterator

import httpx
import pytest
from openai import APIStatusError

from gateway.app import bind, create_app
from gateway.config import GatewayConfig
from gateway.llm_client import LLMClient
from protos import language_model_pb2 as pb
from tests.gateway.scripted import (
    ScriptedLLM,
    ask,
    delta,
    finished,
    gateway_before,
    started,
    usage,
)

SERVE = """
import asyncio, sys
from gateway.app import serve
from gateway.config import GatewayConfig
config = GatewayConfig(port=0, llm=(sys.argv[1],), shutdown_grace_s=float(sys.argv[2]))
asyncio.run(serve(config, lambda port: print(port, flush=True)))
print("returned", flush=True)
"""


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/none", 404, "unknown_url"),
        ("GET", "/v1", 404, "unknown_url"),
        ("POST", "/v1/v1/chat/completions", 404, "unknown_url"),
        ("POST", "/v1/chat/completions/", 404, "unknown_url"),
        ("GET", "/health/", 404, "unknown_url"),
        ("POST", "/v1/embeddings", 404, "unknown_url"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models/x", 405, "method_not_allowed"),
        ("OPTIONS", "/v1/chat/completions", 405, "method_not_allowed"),
    ],
)
async def test_everything_else_is_json(method: str, path: str, status: int, code: str) -> None:
    async with gateway_before() as gateway:
        response = await gateway.http.request(method, path, content=b"{}" if method == "POST" else None)
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["type"], error["param"]) == (code, "invalid_request_error", None)
    assert path in error["message"]
    assert "x-request-id" in response.headers
    assert ("allow" in response.headers) == (status == 405)


async def test_a_body_that_says_it_is_too_large_is_refused_before_it_is_sent() -> None:
    async with gateway_before() as gateway:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999\r\n\r\n")
        async with asyncio.timeout(10):
            head = await reader.readuntil(b"\r\n\r\n")
            body = await reader.readuntil(b"}}")
        writer.close()
    assert head.startswith(b"HTTP/1.1 413 ")
    assert json.loads(body)["error"]["code"] == "request_too_large"


async def test_a_body_that_grows_too_large_is_refused() -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * 1000

    async with gateway_before(config=GatewayConfig(max_body_bytes=5000)) as gateway:
        response = await gateway.http.post("/v1/chat/completions", content=endless())
        exact = json.dumps(ask()).encode().ljust(5000)
        fits = await gateway.http.post("/v1/chat/completions", content=exact)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"
    assert fits.status_code == 200


async def test_a_huge_body_reaches_the_official_client_as_413() -> None:
    async with gateway_before(config=GatewayConfig(max_body_bytes=1 << 20)) as gateway:
        with pytest.raises(APIStatusError) as caught:
            await gateway.openai.chat.completions.create(**ask("x" * (8 << 20)))
    assert (caught.value.status_code, caught.value.code) == (413, "request_too_large")


async def test_a_body_that_never_ends_is_given_up() -> None:
    async with gateway_before(config=GatewayConfig(body_timeout_s=0.2)) as gateway:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n{")
        async with asyncio.timeout(2):
            answer = await reader.read()
        writer.close()
    assert answer.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize(
    ("content_type", "status"),
    [("application/json; charset=utf-8", 200), ("text/plain", 415), ("multipart/form-data; boundary=x", 415)],
)
async def test_content_types(content_type: str, status: int) -> None:
    async with gateway_before() as gateway:
        headers = {"content-type": content_type}
        body = json.dumps(ask()).encode()
        response = await gateway.http.post("/v1/chat/completions", content=body, headers=headers)
    assert response.status_code == status


async def test_a_bug_of_ours_is_a_500_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    """A delta of a choice that nobody asked for stands for any broken assumption."""

    async def script(_request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield started()
        yield delta("a", index=5)
        yield finished()
        yield usage()

    async with gateway_before(script) as gateway:
        response = await gateway.post(ask(), headers={"x-request-id": "bug-1"})
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert response.headers["x-request-id"] == "bug-1"
    assert "IndexError" not in response.text and "unexpected error in request bug-1" in caplog.text


async def test_two_applications_live_in_one_process() -> None:
    client = LLMClient(["127.0.0.1:1"])
    create_app(GatewayConfig(), client)
    create_app(GatewayConfig(), client)
    await client.close()


def test_a_taken_port_is_an_error_that_names_it() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}"):
            bind("127.0.0.1", port)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_lets_a_running_stream_finish_and_serve_return(number: signal.Signals) -> None:
    go_on = asyncio.Event()

    async def script(_request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield started()
        yield delta("a")
        await go_on.wait()
        yield finished()
        yield usage()

    llm = ScriptedLLM(script)
    target = f"127.0.0.1:{await llm.listen()}"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVE, target, "10", stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(20):
            port = int(await process.stdout.readline())
            url = f"http://127.0.0.1:{port}/v1/chat/completions"
            async with (
                httpx.AsyncClient() as http,
                http.stream("POST", url, json=ask(stream=True)) as response,
            ):
                pieces = response.aiter_bytes()
                body = await anext(pieces)
                process.send_signal(number)
                await asyncio.sleep(0.3)
                with pytest.raises(OSError):
                    await asyncio.open_connection("127.0.0.1", port)
                go_on.set()
                body += b"".join([piece async for piece in pieces])
            assert body.endswith(b"data: [DONE]\n\n")
            assert await process.stdout.read() == b"returned\n"
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
        await llm.stop()


async def test_a_stream_that_outlives_the_grace_period_is_cut() -> None:
    async def script(_request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield started()
        yield delta("a")
        await asyncio.Event().wait()

    async with gateway_before(script) as gateway:
        response = gateway.http.stream("POST", "/v1/chat/completions", json=ask(stream=True))
        stream = await response.__aenter__()
        await anext(stream.aiter_bytes())
        # Leaving the context stops the gateway, whose grace period is one second here.
    assert gateway.llm.cancelled.is_set()
