"""Several gateway processes behind one port, as an operator starts them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path

import httpx
import pytest

from gateway.access_config import AccessConfig
from gateway.config import GatewayConfig
from gateway.worker import _config
from gateway.workers import bind, bind_many
from protos import language_model_pb2 as pb
from protos.channel import ClientTlsConfig
from tests.gateway.scripted import Script, ScriptedLLM, ask, delta, finished, says, started, usage

SERVE = """
import asyncio, sys
from gateway.app import serve
from gateway.config import GatewayConfig
config = GatewayConfig(port=0, llm=(sys.argv[1],), shutdown_grace_s=5, gateway_workers=2)
asyncio.run(serve(config, lambda port: print(port, flush=True)))
print("returned", flush=True)
"""


class Gateway:
    def __init__(self, process: asyncio.subprocess.Process, port: int, llm: ScriptedLLM) -> None:
        self.process, self.port, self.llm = process, port, llm
        self.url = f"http://127.0.0.1:{port}"

    def workers(self) -> list[int]:
        text = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(child) for child in text.split()]

    async def post(self) -> int:
        """Through a connection of its own: the kernel chooses the worker anew."""
        async with httpx.AsyncClient() as http:
            return (await http.post(f"{self.url}/v1/chat/completions", json=ask())).status_code

    async def rest_of_output(self) -> bytes:
        assert self.process.stdout is not None
        return await self.process.stdout.read()


@asynccontextmanager
async def two_workers(script: Script) -> AsyncIterator[Gateway]:
    llm = ScriptedLLM(script)
    target = f"127.0.0.1:{await llm.listen()}"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", SERVE, target),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(30):
            yield Gateway(process, int(await process.stdout.readline()), llm)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await llm.stop()


async def test_both_answer_on_one_port_and_one_page_counts_both() -> None:
    async with two_workers(says("Hello")) as gateway:
        for _ in range(24):
            assert await gateway.post() == 200
        async with httpx.AsyncClient() as http:
            page = (await http.get(f"{gateway.url}/metrics")).text
        name = 'tessera_gateway_requests_total{route="/v1/chat/completions",status="200",worker="%d"}'
        counts = [
            float(line.rpartition(" ")[2])
            for worker in (0, 1)
            for line in page.splitlines()
            if line.startswith(name % worker)
        ]
        assert len(counts) == 2 and sum(counts) == 24
        assert page.count("# TYPE tessera_gateway_requests_total counter") == 1


async def test_a_signal_lets_running_streams_finish() -> None:
    go_on = asyncio.Event()

    async def script(_request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        yield started()
        yield delta("a")
        await go_on.wait()
        yield finished()
        yield usage()

    async with two_workers(script) as gateway, httpx.AsyncClient() as http:
        url = f"{gateway.url}/v1/chat/completions"
        async with http.stream("POST", url, json=ask(stream=True)) as response:
            pieces = response.aiter_bytes()
            body = await anext(pieces)
            gateway.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.3)
            with pytest.raises(OSError):
                await asyncio.open_connection("127.0.0.1", gateway.port)
            go_on.set()
            body += b"".join([piece async for piece in pieces])
        assert body.endswith(b"data: [DONE]\n\n")
        assert await gateway.rest_of_output() == b"returned\n"
        assert await gateway.process.wait() == 0


async def test_a_worker_that_dies_ends_the_gateway() -> None:
    async with two_workers(says("a")) as gateway:
        first, second = gateway.workers()
        os.kill(first, signal.SIGKILL)
        assert await gateway.process.wait() == 1
        assert not Path(f"/proc/{second}").exists()


async def test_workers_end_with_a_parent_that_is_killed() -> None:
    async with two_workers(says("a")) as gateway:
        workers = gateway.workers()
        gateway.process.kill()
        await gateway.process.wait()
        while any(Path(f"/proc/{worker}/fd").exists() and _runs(worker) for worker in workers):
            await asyncio.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_port_is_not_shared_by_mistake() -> None:
    listeners = bind_many("127.0.0.1", 0, 3)
    try:
        port = listeners[0].getsockname()[1]
        assert {listener.getsockname()[1] for listener in listeners} == {port}
        listeners[0].listen()
        for count in (1, 2):
            with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{port}"):
                bind_many("127.0.0.1", port, count)
    finally:
        for listener in listeners:
            listener.close()


def test_one_socket_is_not_shared() -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(OSError):
            bind_many("127.0.0.1", taken.getsockname()[1], 2)
        assert not taken.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)


def test_a_worker_has_the_settings_of_its_parent() -> None:
    access = AccessConfig(api_key_hashes=("a" * 64,), cors_origins=("https://a.example",), key_concurrency=3)
    config = GatewayConfig(llm=("a:1", "b:2"), access=access, llm_tls=ClientTlsConfig(ca="ca.pem"))
    assert _config(json.loads(json.dumps(asdict(config)))) == config
