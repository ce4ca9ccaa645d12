"""Several answers as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from gateway.events import Batches, Delta, Event, Finished, Restarted, Started, Usage
from gateway.merging import added, merged
from protos.errors import ModelError


async def _says(*batches: list[Event]) -> Batches:
    for batch in batches:
        yield batch


async def _hangs(closed: asyncio.Event) -> Batches:
    try:
        yield [Started(1)]
        await asyncio.Event().wait()
    finally:
        closed.set()


async def _flat(batches: AsyncIterator[list[Event]]) -> list[Event]:
    return [event async for batch in batches for event in batch]


def test_usage_is_added_up_field_by_field() -> None:
    assert added([Usage(1, 2, 3, 4), Usage(10, 20, 30, 40)]) == Usage(11, 22, 33, 44)


async def test_choices_are_numbered_through_and_usage_comes_last() -> None:
    one = _says([Started(3)], [Delta(0, "a", 1), Delta(1, "b", 1)], [Finished(0, "stop"), Usage(3, 2)])
    two = _says([Started(4)], [Delta(1, "c", 1), Finished(1, "length")], [Usage(4, 1, cached_tokens=2)])
    events = await _flat(merged([one, two], 2))
    assert {(event.index, event.text) for event in events if isinstance(event, Delta)} == {
        (0, "a"),
        (1, "b"),
        (3, "c"),
    }
    assert {(event.index, event.reason) for event in events if isinstance(event, Finished)} == {
        (0, "stop"),
        (3, "length"),
    }
    assert [event for event in events if isinstance(event, Started)][-1] == Started(7)
    assert [event for event in events if isinstance(event, Usage)] == [Usage(7, 3, 2)] == events[-1:]


async def test_silence_passes_and_restarts_do_not() -> None:
    batches = [batch async for batch in merged([_says([], [Restarted()], [Started(1)], [Usage(1, 0)])], 1)]
    assert batches == [[], [Started(1)], [Usage(1, 0)]]


async def test_no_usage_is_invented_for_an_answer_that_broke_off() -> None:
    events = await _flat(merged([_says([Usage(1, 1)]), _says([Started(1)])], 1))
    assert not any(isinstance(event, Usage) for event in events)


async def test_the_first_error_ends_all() -> None:
    async def fails() -> Batches:
        yield [Started(1)]
        raise ModelError("x")

    closed = asyncio.Event()
    with pytest.raises(ModelError):
        await _flat(merged([_hangs(closed), fails()], 1))
    assert closed.is_set()


async def test_closing_closes_all() -> None:
    first, second = asyncio.Event(), asyncio.Event()
    batches = merged([_hangs(first), _hangs(second)], 1)
    await anext(batches)
    await anext(batches)
    await batches.aclose()  # type: ignore[attr-defined]
    assert first.is_set() and second.is_set()
