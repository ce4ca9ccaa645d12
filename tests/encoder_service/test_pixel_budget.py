from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from PIL import Image

from encoder_service.pixel_budget import PixelBudget
from encoder_service.tiling import TileCutter, TilePlan

CUTTER = TileCutter(Image.new("RGB", (4, 4)), TilePlan(1, 1, False), 4)


class Decoder:
    """Opens pictures and counts how often."""

    def __init__(self) -> None:
        self.opened: list[str] = []

    def opens(self, name: str) -> Callable[[], asyncio.Future[TileCutter]]:
        def open_picture() -> asyncio.Future[TileCutter]:
            self.opened.append(name)
            ready: asyncio.Future[TileCutter] = asyncio.get_running_loop().create_future()
            ready.set_result(CUTTER)
            return ready

        return open_picture


class User:
    """A stream that uses its picture until told to stop."""

    def __init__(self, budget: PixelBudget, stream: int, num_bytes: int, decoder: Decoder) -> None:
        self.stop = asyncio.Event()
        self.is_using = False
        self.budget, self.stream, self.num_bytes, self.decoder = budget, stream, num_bytes, decoder
        self.task = asyncio.create_task(self.use())

    async def use(self) -> None:
        name = str(self.stream)
        async with self.budget.use(
            (self.stream, 0), self.num_bytes, self.num_bytes, self.decoder.opens(name)
        ) as cutter:
            assert cutter is CUTTER
            self.is_using = True
            await self.stop.wait()
        self.is_using = False

    async def end(self) -> None:
        self.stop.set()
        await self.task


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def use_once(budget: PixelBudget, stream: int, num_bytes: int, decoder: Decoder) -> None:
    await User(budget, stream, num_bytes, decoder).end()


async def test_a_picture_is_opened_once_and_kept() -> None:
    budget, decoder = PixelBudget(100), Decoder()
    for _ in range(3):
        await use_once(budget, 1, 60, decoder)
    assert decoder.opened == ["1"]
    assert budget.used_bytes == 60
    budget.forget(1)
    assert budget.used_bytes == 0


async def test_idle_pictures_make_room_least_recently_used_first() -> None:
    budget, decoder = PixelBudget(100), Decoder()
    for stream in (1, 2, 1, 3, 1, 2):
        await use_once(budget, stream, 50, decoder)
    assert decoder.opened == ["1", "2", "3", "2"]
    assert budget.used_bytes == 100


async def test_a_busy_picture_is_waited_for() -> None:
    budget, decoder = PixelBudget(100), Decoder()
    first, second = User(budget, 1, 60, decoder), User(budget, 2, 60, decoder)
    await settle()
    assert (first.is_using, second.is_using, budget.used_bytes) == (True, False, 60)
    await first.end()
    await settle()
    assert second.is_using
    await second.end()
    assert budget.used_bytes == 60  # the first one's was dropped


async def test_small_pictures_do_not_overtake_a_large_one_that_waits() -> None:
    budget, decoder = PixelBudget(100), Decoder()
    first, large, small = (
        User(budget, 1, 60, decoder),
        User(budget, 2, 80, decoder),
        User(budget, 3, 10, decoder),
    )
    await settle()
    assert (large.is_using, small.is_using) == (False, False)
    await first.end()
    await settle()
    assert (large.is_using, small.is_using) == (True, True)
    await large.end()
    await small.end()
    assert decoder.opened == ["1", "2", "3"]


async def test_a_picture_above_the_whole_budget_is_let_in_alone() -> None:
    budget, decoder = PixelBudget(100), Decoder()
    small, huge = User(budget, 1, 10, decoder), User(budget, 2, 1000, decoder)
    await settle()
    assert not huge.is_using
    await small.end()
    await settle()
    late = User(budget, 3, 1, decoder)
    await settle()
    assert (huge.is_using, late.is_using) == (True, False)
    await huge.end()
    await late.end()
    budget.forget(3)
    assert budget.used_bytes == 0


async def test_a_cancelled_waiter_lets_those_behind_it_in() -> None:
    budget, decoder = PixelBudget(100), Decoder()
    first, large, small = (
        User(budget, 1, 60, decoder),
        User(budget, 2, 80, decoder),
        User(budget, 3, 10, decoder),
    )
    await settle()
    large.task.cancel()
    await settle()
    assert small.is_using
    await first.end()
    await small.end()
    assert decoder.opened == ["1", "3"]
    for stream in (1, 2, 3):
        budget.forget(stream)
    assert budget.used_bytes == 0


async def test_a_waiter_cancelled_together_with_the_release_leaves_nothing() -> None:
    """Either order within one turn of the loop."""
    for is_cancelled_first in (False, True):
        budget, decoder = PixelBudget(100), Decoder()
        first, second = User(budget, 1, 100, decoder), User(budget, 2, 100, decoder)
        await settle()
        if is_cancelled_first:
            second.task.cancel()
        first.stop.set()
        await asyncio.sleep(0)
        second.task.cancel()
        await asyncio.wait([first.task, second.task])
        budget.forget(1)
        assert budget.used_bytes == 0
        await use_once(budget, 3, 100, decoder)


@pytest.mark.parametrize(
    ("peak_bytes", "held_bytes", "while_opened", "afterwards"),
    [(90, 30, 90, 30), (20, 40, 40, 40), (500, 40, 100, 40), (500, 300, 100, 100)],
)
async def test_a_picture_costs_its_peak_while_opened_and_then_what_it_holds(
    peak_bytes: int, held_bytes: int, while_opened: int, afterwards: int
) -> None:
    budget, used = PixelBudget(100), []

    async def open_picture() -> TileCutter:
        used.append(budget.used_bytes)
        return CUTTER

    async with budget.use((1, 0), peak_bytes, held_bytes, open_picture):
        used.append(budget.used_bytes)
    assert used == [while_opened, afterwards]
    budget.forget(1)
    assert budget.used_bytes == 0


async def test_what_only_opening_took_lets_the_next_picture_in() -> None:
    budget, decoder = PixelBudget(100), Decoder()
    async with budget.use((1, 0), 100, 40, decoder.opens("1")):
        second = User(budget, 2, 60, decoder)
        await settle()
        assert second.is_using
        await second.end()


async def test_a_picture_that_cannot_be_opened_costs_nothing() -> None:
    async def fail() -> TileCutter:
        raise ValueError("corrupt")

    budget, decoder = PixelBudget(100), Decoder()
    with pytest.raises(ValueError, match="corrupt"):
        async with budget.use((1, 0), 100, 100, fail):
            raise AssertionError("not reached")
    assert budget.used_bytes == 0
    await use_once(budget, 2, 100, decoder)


async def test_cancelling_while_a_picture_is_opened_gives_its_bytes_to_the_next() -> None:
    budget, decoder = PixelBudget(100), Decoder()

    async def never() -> TileCutter:
        await asyncio.Event().wait()
        raise AssertionError("not reached")

    async def use_it() -> None:
        async with budget.use((1, 0), 100, 100, never):
            raise AssertionError("not reached")

    opening = asyncio.create_task(use_it())
    await settle()
    waiting = User(budget, 2, 100, decoder)
    await settle()
    assert not waiting.is_using
    opening.cancel()
    await waiting.end()
    assert decoder.opened == ["2"]


async def test_an_error_of_the_user_leaves_the_picture_idle() -> None:
    budget, decoder = PixelBudget(100), Decoder()
    with pytest.raises(KeyError):
        async with budget.use((1, 0), 100, 100, decoder.opens("1")):
            raise KeyError
    await use_once(budget, 2, 100, decoder)
    assert decoder.opened == ["1", "2"]
