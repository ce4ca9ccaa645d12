"""Events in batches: everything that is already there comes at once, and silence is reported."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

# A client that does not read stops the source here, and through gRPC's flow control the service behind it.
MAX_BUFFERED = 256


@dataclass(frozen=True)
class _End(Generic[T]):
    error: Exception | None


async def batches(events: AsyncGenerator[T, None], idle_s: float) -> AsyncGenerator[list[T], None]:
    """Yield what has arrived; an empty list after `idle_s` seconds without anything.

    An error of `events` is raised after the events before it.  Closing cancels `events` at once.
    """
    queue: asyncio.Queue[T | _End[T]] = asyncio.Queue(MAX_BUFFERED)
    reader = asyncio.create_task(_read(events, queue))
    try:
        while True:
            batch, end = await _next_batch(queue, idle_s)
            if batch or end is None:
                yield batch
            if end is not None:
                if end.error is not None:
                    raise end.error
                return
    finally:
        reader.cancel()
        await asyncio.wait({reader})


async def _read(events: AsyncGenerator[T, None], queue: asyncio.Queue[T | _End[T]]) -> None:
    error: Exception | None = None
    try:
        async with aclosing(events) as source:
            async for event in source:
                await queue.put(event)
    except Exception as caught:
        error = caught
    await queue.put(_End(error))


async def _next_batch(queue: asyncio.Queue[T | _End[T]], idle_s: float) -> tuple[list[T], _End[T] | None]:
    batch: list[T] = []
    try:
        async with asyncio.timeout(idle_s):
            item = await queue.get()
    except TimeoutError:
        return batch, None
    while not isinstance(item, _End):
        batch.append(item)
        if queue.empty():
            return batch, None
        item = queue.get_nowait()
    return batch, item
