"""The pool of language-model services."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager

import pytest

from gateway.events import Event, Usage
from gateway.llm_client import AVOID_S, LLMClient
from gateway.model_info import ModelInfo
from protos import language_model_pb2 as pb
from protos.errors import Cancelled, Overloaded, ServingError, Unavailable
from tests.gateway.scripted import Script, ScriptedLLM, default_info, hangs_after, replies, says, started


@asynccontextmanager
async def _pool(*scripts: Script) -> AsyncIterator[tuple[LLMClient, list[ScriptedLLM], list[int]]]:
    async with AsyncExitStack() as stack:
        services = [ScriptedLLM(script) for script in scripts]
        ports = []
        for service in services:
            ports.append(await service.listen())
            stack.push_async_callback(service.stop)
        client = LLMClient([f"127.0.0.1:{port}" for port in ports], model_timeout_s=0.5)
        stack.push_async_callback(client.close)
        yield client, services, ports


async def _generate(client: LLMClient) -> list[Event]:
    async with aclosing(client.generate(pb.GenerateRequest(), metadata=(), timeout_s=5)) as events:
        return [event async for batch in events for event in batch]


async def test_idle_services_take_turns() -> None:
    async with _pool(says("a"), says("a"), says("a")) as (client, services, _):
        for _ in range(6):
            assert isinstance((await _generate(client))[-1], Usage)
    assert [len(service.requests) for service in services] == [2, 2, 2]


async def test_the_least_busy_service_is_asked() -> None:
    async with _pool(hangs_after(started()), says("a")) as (client, services, _):
        async with aclosing(client.generate(pb.GenerateRequest(), metadata=(), timeout_s=5)) as busy:
            await anext(busy)
            for _ in range(3):
                await _generate(client)
        async with asyncio.timeout(1):
            await services[0].cancelled.wait()
    assert [len(service.requests) for service in services] == [1, 3]


async def test_an_unreachable_service_is_avoided_and_found_again() -> None:
    async with _pool(says("a"), says("a")) as (client, services, ports):
        await services[0].stop()
        failures = 0
        for _ in range(4):
            try:
                await _generate(client)
            except Unavailable:
                failures += 1
        assert (failures, len(services[1].requests)) == (1, 3)
        await services[0].listen(ports[0])
        async with asyncio.timeout(AVOID_S + 5):
            while not services[0].requests:
                await asyncio.sleep(0.1)
                await asyncio.gather(_generate(client), return_exceptions=True)


async def test_text_of_grpc_itself_is_replaced() -> None:
    async with _pool(says("a")) as (client, services, ports):
        await services[0].stop()
        with pytest.raises(Unavailable) as caught:
            await _generate(client)
    assert str(ports[0]) not in caught.value.message and "not reachable" in caught.value.message


async def test_text_of_the_service_is_kept() -> None:
    async with _pool(replies(Overloaded("the queue is full", retry_after_s=4))) as (client, _, _):
        with pytest.raises(Overloaded, match="the queue is full") as caught:
            await _generate(client)
    assert caught.value.retry_after_s == 4


async def test_a_call_that_the_service_cancels_is_an_error_and_not_our_cancellation() -> None:
    async with _pool(replies(started(), Cancelled("x"))) as (client, _, _):
        with pytest.raises(Cancelled):
            await _generate(client)


async def test_the_model_is_remembered_while_its_service_is_away() -> None:
    async with _pool(says("a")) as (client, services, _):
        known = await client.model()
        await services[0].stop()
        with pytest.raises(Unavailable):
            await _generate(client)
        assert await client.model() == known


async def test_nobody_has_ever_answered() -> None:
    async with _pool(says("a")) as (client, services, _):
        services[0].answers_get_model = False
        with pytest.raises(Unavailable, match="does not answer"):
            await client.model()


async def test_each_service_answers_for_itself() -> None:
    async with _pool(says("a"), says("a")) as (client, services, _):
        services[0].info = default_info(encoders_ready=0)
        await services[1].stop()
        first, second = await client.models()
    assert isinstance(first, ModelInfo) and first.encoders_ready == 0
    assert isinstance(second, ServingError)
