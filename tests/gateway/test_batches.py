"""Batching of an asynchronous source."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from gateway.batches import MAX_BUFFERED, batches


async def test_everything_that_is_there_comes_at_once() -> None:
    async def source() -> AsyncGenerator[int, None]:
        yield 1
        yield 2
        await asyncio.sleep(0.02)
        yield 3

    assert [batch async for batch in batches(source(), 5)] == [[1, 2], [3]]


async def test_silence_is_reported() -> None:
    async def source() -> AsyncGenerator[int, None]:
        await asyncio.sleep(0.12)
        yield 1

    assert [batch async for batch in batches(source(), 0.05)] == [[], [], [1]]


async def test_an_error_comes_after_what_was_before_it() -> None:
    async def source() -> AsyncGenerator[int, None]:
        yield 1
        raise ValueError("broken")

    seen = []
    with pytest.raises(ValueError, match="broken"):
        async for batch in batches(source(), 5):
            seen.append(batch)
    assert seen == [[1]]


@pytest.mark.parametrize("num_events", [1, 10 * MAX_BUFFERED])
async def test_closing_closes_a_source_that_waits_and_one_that_is_held_back(num_events: int) -> None:
    closed = asyncio.Event()
    produced = 0

    async def source() -> AsyncGenerator[int, None]:
        nonlocal produced
        try:
            for number in range(num_events):
                produced += 1
                yield number
            await asyncio.Event().wait()
        finally:
            closed.set()

    reading = batches(source(), 5)
    await anext(reading)
    await reading.aclose()
    assert closed.is_set()
    assert produced <= 2 * MAX_BUFFERED + 2
