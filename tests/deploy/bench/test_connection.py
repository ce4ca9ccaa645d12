"""A connection carries one request after the other, and a lost one fails the request that waits."""

from __future__ import annotations

import pytest

from deploy.bench.answer import Answer, AnswerError
from deploy.bench.connection import connect
from tests.deploy.bench.scripted_server import ScriptedServer


async def test_requests_share_a_connection() -> None:
    server = ScriptedServer()
    async with server.listening() as base_url:
        connection = await connect(base_url)
        for _ in range(3):
            answer = Answer()
            await connection.post(b'{"model": "m"}', answer)
            assert answer.num_texts == 3
        assert connection.usable and server.connections == 1
        connection.close()
        assert not connection.usable


async def test_a_large_body_arrives_whole() -> None:
    server = ScriptedServer()
    async with server.listening() as base_url:
        connection = await connect(base_url)
        await connection.post(b'{"model": "' + b"m" * 5_000_000 + b'"}', Answer())
        assert server.bodies == [{"model": "m" * 5_000_000}]
        connection.close()


async def test_a_lost_connection_fails_the_request() -> None:
    server = ScriptedServer(hang_up=lambda number: True)
    async with server.listening() as base_url:
        connection = await connect(base_url)
        with pytest.raises(OSError):
            await connection.post(b"{}", Answer())
        assert not connection.usable


async def test_a_refusal_fails_the_request() -> None:
    server = ScriptedServer(fail=lambda number: True)
    async with server.listening() as base_url:
        connection = await connect(base_url)
        with pytest.raises(AnswerError, match="503 busy"):
            await connection.post(b"{}", Answer())
        connection.close()
