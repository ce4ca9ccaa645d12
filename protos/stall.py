"""A watch on a stage of a service that may hang: a device that does not answer, a process that is stopped."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from protos.server import Server

TICK_S = 0.5

log = logging.getLogger(__name__)


class StallWatch:
    """Says when a stage has had work, but made no progress, for `limit_s` seconds; and when it goes on.

    Time counts in ticks of this loop: while that itself is held up, the stage is not to blame.
    """

    def __init__(
        self,
        stage: str,
        limit_s: float,
        has_work: Callable[[], bool],
        progress: Callable[[], int],
        on_change: Callable[[bool], Awaitable[None]],
    ) -> None:
        """`progress` is a count that any progress changes; `on_change` hears whether the stage stalls now."""
        self.is_stalled = False
        self._stage = stage
        self._limit_s = limit_s
        self._has_work = has_work
        self._progress = progress
        self._on_change = on_change
        self._last_progress = progress()
        self._standing_s = 0.0

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            await self.tick()

    async def tick(self) -> None:
        """What `run` does every TICK_S."""
        progress = self._progress()
        stands = progress == self._last_progress and self._has_work()
        self._standing_s = self._standing_s + TICK_S if stands else 0.0
        self._last_progress = progress
        await self._set(self._standing_s > self._limit_s)

    async def _set(self, is_stalled: bool) -> None:
        if is_stalled == self.is_stalled:
            return
        self.is_stalled = is_stalled
        if is_stalled:
            log.error("the %s has made no progress for %g s", self._stage, self._limit_s)
        else:
            log.info("the %s goes on", self._stage)
        await self._on_change(is_stalled)


async def withdraw_while_stalled(
    server: Server,
    stage: str,
    limit_s: float,
    has_work: Callable[[], bool],
    progress: Callable[[], int],
    set_stalled: Callable[[bool], None],
) -> None:
    """Watch a stage until cancelled; while it stalls, refuse (`set_stalled`), and let health say so."""

    async def note(is_stalled: bool) -> None:
        set_stalled(is_stalled)
        await server.set_serving(not is_stalled)

    await StallWatch(stage, limit_s, has_work, progress, note).run()
