"""A stage that has work and makes no progress is found out, and taken back when it goes on."""

from __future__ import annotations

import asyncio

from protos.stall import TICK_S, StallWatch

LIMIT_TICKS = 3


class Stage:
    def __init__(self) -> None:
        self.has_work = True
        self.progress = 0
        self.changes: list[bool] = []
        self.watch = StallWatch(
            "tower", LIMIT_TICKS * TICK_S, lambda: self.has_work, lambda: self.progress, self._note
        )

    async def _note(self, is_stalled: bool) -> None:
        self.changes.append(is_stalled)

    async def tick(self, times: int, step: int = 0) -> None:
        for _ in range(times):
            self.progress += step
            await self.watch.tick()


async def test_it_stalls_once_when_it_has_stood_for_longer_than_the_limit() -> None:
    stage = Stage()
    await stage.tick(LIMIT_TICKS)
    assert stage.changes == [] and not stage.watch.is_stalled
    await stage.tick(5)
    assert stage.changes == [True] and stage.watch.is_stalled


async def test_progress_ends_the_stall_and_starts_the_limit_anew() -> None:
    stage = Stage()
    await stage.tick(LIMIT_TICKS + 1)
    await stage.tick(1, step=1)
    assert stage.changes == [True, False]
    await stage.tick(LIMIT_TICKS)
    assert stage.changes == [True, False]
    await stage.tick(1)
    assert stage.changes == [True, False, True]


async def test_a_stage_without_work_may_stand() -> None:
    stage = Stage()
    stage.has_work = False
    await stage.tick(10 * LIMIT_TICKS)
    assert stage.changes == []


async def test_it_watches_until_it_is_cancelled() -> None:
    stage = Stage()
    watching = asyncio.create_task(stage.watch.run())
    async with asyncio.timeout(30):
        while not stage.watch.is_stalled:
            await asyncio.sleep(TICK_S / 10)
    watching.cancel()
    await asyncio.wait([watching])
    assert watching.cancelled()
