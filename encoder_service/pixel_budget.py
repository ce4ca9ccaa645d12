"""Decoded pictures of all streams within one byte budget; idle ones make room for wanted ones.

Knows nothing about formats and tiles: a picture is whatever `open_picture` returns, with its costs in bytes.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from encoder_service.tiling import Cutter

PictureKey = tuple[int, ...]  # (stream, medium, section)


@dataclass
class _Held:
    cutter: Cutter
    num_bytes: int
    is_busy: bool


@dataclass(frozen=True, eq=False)
class _Waiter:
    num_bytes: int
    reserved: asyncio.Future[None]


class PixelBudget:
    """A picture is decoded when the first of its tiles is wanted and kept while there is room.

    Streams wait for busy pictures only, never for idle ones, so two streams cannot wait for each other; they
    wait in order of arrival, so small pictures cannot starve a large one.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._used_bytes = 0
        self._held: OrderedDict[PictureKey, _Held] = OrderedDict()  # least recently used first
        self._waiters: deque[_Waiter] = deque()

    @property
    def used_bytes(self) -> int:
        """Of the pictures that are decoded or being decoded."""
        return self._used_bytes

    @asynccontextmanager
    async def use(
        self,
        key: PictureKey,
        peak_bytes: int,
        held_bytes: int,
        open_picture: Callable[[], Awaitable[Cutter]],
    ) -> AsyncIterator[Cutter]:
        """The decoded picture, busy until the block ends.  One user a key at a time.

        It counts as the larger of both while it is opened and as `held_bytes` afterwards.  A picture above
        the whole budget is let in when nothing else is decoded.
        """
        held = self._held.get(key) or await self._open(key, peak_bytes, held_bytes, open_picture)
        held.is_busy = True
        self._held.move_to_end(key)
        try:
            yield held.cutter
        finally:
            held.is_busy = False
            self._serve_waiters()

    def forget(self, stream: int) -> None:
        """Drop what the stream has decoded; none of it may be busy."""
        for key in [key for key in self._held if key[0] == stream]:
            assert not self._held[key].is_busy, key
            self._release(self._held.pop(key).num_bytes)

    async def _open(
        self,
        key: PictureKey,
        peak_bytes: int,
        held_bytes: int,
        open_picture: Callable[[], Awaitable[Cutter]],
    ) -> _Held:
        held_bytes = min(held_bytes, self._max_bytes)
        peak_bytes = min(max(peak_bytes, held_bytes), self._max_bytes)
        await self._reserve(peak_bytes)
        try:
            cutter = await open_picture()
        except BaseException:
            self._release(peak_bytes)
            raise
        self._held[key] = _Held(cutter, held_bytes, is_busy=True)
        self._release(peak_bytes - held_bytes)
        return self._held[key]

    async def _reserve(self, num_bytes: int) -> None:
        waiter = _Waiter(num_bytes, asyncio.get_running_loop().create_future())
        self._waiters.append(waiter)
        self._serve_waiters()
        try:
            await waiter.reserved
        except asyncio.CancelledError:
            if waiter.reserved.cancelled():
                self._serve_waiters()  # those behind it need not wait for what it wanted
            else:  # reserved and cancelled within one turn of the loop
                self._release(num_bytes)
            raise

    def _release(self, num_bytes: int) -> None:
        self._used_bytes -= num_bytes
        self._serve_waiters()

    def _serve_waiters(self) -> None:
        """In order of arrival, as far as there is room.  Cancelled ones leave when they are first."""
        while self._waiters:
            waiter = self._waiters[0]
            if not waiter.reserved.cancelled():
                if not self._make_room(waiter.num_bytes):
                    return
                self._used_bytes += waiter.num_bytes
                waiter.reserved.set_result(None)
            self._waiters.popleft()

    def _make_room(self, num_bytes: int) -> bool:
        """Drop idle pictures, the least recently used first, until there is room; False if there is none."""
        for key in [key for key, held in self._held.items() if not held.is_busy]:
            if self._used_bytes + num_bytes <= self._max_bytes:
                break
            self._used_bytes -= self._held.pop(key).num_bytes
        return self._used_bytes + num_bytes <= self._max_bytes
