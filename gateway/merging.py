"""The answers of several prompts as one: choices numbered through, usage added up."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import aclosing
from dataclasses import replace

from gateway.events import Batches, Delta, Event, Finished, Restarted, Started, Usage


def added(usages: Iterable[Usage]) -> Usage:
    total = Usage(0, 0)
    for usage in usages:
        total = Usage(
            total.prompt_tokens + usage.prompt_tokens,
            total.completion_tokens + usage.completion_tokens,
            total.cached_tokens + usage.cached_tokens,
            total.image_tokens + usage.image_tokens,
        )
    return total


async def merged(answers: Sequence[Batches], choices_a_prompt: int) -> Batches:
    """Events of all answers as they come, ended by one Usage; the first error ends all.

    Choices of the i-th answer begin at `i * choices_a_prompt`.  `Restarted` is left out: an answer that has
    shown text is not begun anew.
    """
    arrivals: asyncio.Queue[tuple[int, list[Event] | Exception | None]] = asyncio.Queue(len(answers))
    pumps = [asyncio.create_task(_pump(i, answer, arrivals)) for i, answer in enumerate(answers)]
    started: dict[int, int] = {}
    usages: dict[int, Usage] = {}
    try:
        left = len(answers)
        while left:
            index, arrival = await arrivals.get()
            if isinstance(arrival, Exception):
                raise arrival
            if arrival is None:
                left -= 1
                continue
            batch = list(_numbered(arrival, index, choices_a_prompt, started, usages))
            if batch or not arrival:  # an empty one says that it is silent
                yield batch
        if len(usages) == len(answers):
            yield [added(usages.values())]
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(
    index: int, answer: Batches, arrivals: asyncio.Queue[tuple[int, list[Event] | Exception | None]]
) -> None:
    try:
        async with aclosing(answer) as batches:
            async for batch in batches:
                await arrivals.put((index, batch))
        await arrivals.put((index, None))
    except Exception as error:
        await arrivals.put((index, error))


def _numbered(
    batch: list[Event], answer: int, choices_a_prompt: int, started: dict[int, int], usages: dict[int, Usage]
) -> Iterable[Event]:
    for event in batch:
        if isinstance(event, Delta | Finished):
            yield replace(event, index=event.index + answer * choices_a_prompt)
        elif isinstance(event, Started):
            started[answer] = event.prompt_tokens
            yield Started(sum(started.values()))
        elif isinstance(event, Usage):
            usages[answer] = event
        else:
            assert isinstance(event, Restarted)
