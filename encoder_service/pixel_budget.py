"""Decoded pictures of all streams within one byte budget; idle ones make room for wanted ones.

Knows nothing about formats and tiles: a picture is whatever `open` returns, with a cost in bytes.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from encoder_service.tiling import TileCutter

PictureKey = tuple[int, int]  # (stream, medium)


@dataclass
class _Held:
    cutter: TileCutter
    num_bytes: int
    is_busy: bool


class PixelBudget:
    """A picture is decoded when the first of its tiles is wanted and kept while there is room.

    Streams wait for busy pictures only, never for idle ones, so two streams cannot wait for each other.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._used_bytes = 0
        self._held: OrderedDict[PictureKey, _Held] = OrderedDict()  # least recently used first
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def use(
        self, key: PictureKey, num_bytes: int, open_picture: Callable[[], Awaitable[TileCutter]]
    ) -> AsyncIterator[TileCutter]:
        """The decoded picture, busy until the block ends.  One user a key at a time.

        A picture above the whole budget is let in when nothing else is decoded.
        """
        if key in self._held:
            self._held[key].is_busy = True
            self._held.move_to_end(key)
        else:
            await self._reserve(min(num_bytes, self._max_bytes))
            try:
                cutter = await open_picture()
            except BaseException:
                await self._release(min(num_bytes, self._max_bytes))
                raise
            self._held[key] = _Held(cutter, min(num_bytes, self._max_bytes), is_busy=True)
        held = self._held[key]
        try:
            yield held.cutter
        finally:
            held.is_busy = False
            async with self._changed:
                self._changed.notify_all()

    async def forget(self, stream: int) -> None:
        """Drop what the stream has decoded; none of it may be busy."""
        for key in [key for key in self._held if key[0] == stream]:
            await self._release(self._held.pop(key).num_bytes)

    async def _reserve(self, num_bytes: int) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._make_room(num_bytes))
            self._used_bytes += num_bytes

    def _make_room(self, num_bytes: int) -> bool:
        for key in [key for key, held in self._held.items() if not held.is_busy]:
            if self._used_bytes + num_bytes <= self._max_bytes:
                break
            self._used_bytes -= self._held.pop(key).num_bytes
        return self._used_bytes + num_bytes <= self._max_bytes

    async def _release(self, num_bytes: int) -> None:
        async with self._changed:
            self._used_bytes -= num_bytes
            self._changed.notify_all()
