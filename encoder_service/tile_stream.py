"""The granted tiles of one stream: decoded, cut and encoded ahead, handed out in the order of the grants."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from encoder_service.batcher import EncodedTile, TileBatcher
from encoder_service.media import ImageLimits, decode_image
from encoder_service.pixel_budget import PixelBudget
from encoder_service.tiling import TileCutter, TilePlan

RGB_BYTES = 3

T = TypeVar("T")


@dataclass(frozen=True)
class Medium:
    """A picture of which only the header has been read."""

    data: bytes
    width: int  # pixels, after EXIF rotation
    height: int  # pixels, after EXIF rotation
    plan: TilePlan
    content_hash: bytes


@dataclass(frozen=True)
class GrantedTile:
    medium: int
    tile: int


@dataclass(frozen=True)
class FinishedTile:
    granted: GrantedTile
    embeds: torch.Tensor  # [num_tokens, hidden_size] on the host


@dataclass
class StreamTimings:
    """Nanoseconds, summed over tiles."""

    decode_ns: int = 0
    tile_ns: int = 0
    queue_ns: int = 0
    encode_ns: int = 0


@dataclass(frozen=True)
class TileWorkers:
    """What all streams of the service share."""

    batcher: TileBatcher
    pixels: PixelBudget
    threads: ThreadPoolExecutor
    image_size: int
    image_limits: ImageLimits


class TileStream:
    """Cutting runs at most `max_ahead` tiles in front of what has been taken: that bounds its memory."""

    def __init__(
        self, stream_id: int, media: Sequence[Medium], workers: TileWorkers, priority: int, max_ahead: int
    ) -> None:
        self.timings = StreamTimings()
        self._stream_id = stream_id
        self._media = media
        self._workers = workers
        self._priority = priority
        self._granted: asyncio.Queue[GrantedTile | None] = asyncio.Queue()
        self._submitted: asyncio.Queue[tuple[GrantedTile, asyncio.Future[EncodedTile]] | None] = (
            asyncio.Queue(max_ahead)
        )
        self._pump = asyncio.create_task(self._cut_and_submit())
        self._current: asyncio.Future[EncodedTile] | None = None

    def grant(self, tiles: Iterable[GrantedTile]) -> None:
        for tile in tiles:
            self._granted.put_nowait(tile)

    def end_grants(self) -> None:
        self._granted.put_nowait(None)

    async def next_tile(self) -> FinishedTile | None:
        """The next granted tile, or None when all grants have been served.

        Raises:
            InvalidRequest: the picture turned out to be corrupt; the field names it.
            ModelError, Unavailable: the tower failed, or is shutting down.
        """
        submitted = await self._take()
        if submitted is None:
            return None
        granted, future = submitted
        self._current = future
        encoded = await future
        self._current = None
        self.timings.queue_ns += encoded.queue_ns
        self.timings.encode_ns += encoded.encode_ns
        return FinishedTile(granted, encoded.embeds)

    async def close(self) -> None:
        """Take waiting tiles out of the batcher's queue and drop the decoded pictures."""
        self._pump.cancel()
        await asyncio.wait([self._pump])
        if self._current is not None:
            self._current.cancel()
        while not self._submitted.empty():
            submitted = self._submitted.get_nowait()
            if submitted is not None:
                submitted[1].cancel()
        await self._workers.pixels.forget(self._stream_id)

    async def _take(self) -> tuple[GrantedTile, asyncio.Future[EncodedTile]] | None:
        """What the pump hands over, or its error once everything before it has been taken."""
        taking = asyncio.create_task(self._submitted.get())
        try:
            await asyncio.wait((taking, self._pump), return_when=asyncio.FIRST_COMPLETED)
            if not taking.done() and self._submitted.empty():
                self._pump.result()
            return await taking
        finally:
            taking.cancel()

    async def _cut_and_submit(self) -> None:
        while (granted := await self._granted.get()) is not None:
            pixels = await self._cut(granted)
            future = self._workers.batcher.submit(pixels, (self._priority, granted.tile))
            try:
                await self._submitted.put((granted, future))
            except asyncio.CancelledError:
                future.cancel()  # nobody else knows of it yet
                raise
        await self._submitted.put(None)

    async def _cut(self, granted: GrantedTile) -> torch.Tensor:
        """uint8 [3, image_size, image_size]"""
        medium = self._media[granted.medium]
        key = (self._stream_id, granted.medium)
        open_picture = partial(self._decode, granted.medium)
        async with self._workers.pixels.use(key, self._cost(medium), open_picture) as cutter:
            start = time.monotonic_ns()
            pixels = await self._in_thread(partial(cutter.cut, [granted.tile]))
            self.timings.tile_ns += time.monotonic_ns() - start
        return pixels[0]

    async def _decode(self, index: int) -> TileCutter:
        medium, workers = self._media[index], self._workers
        start = time.monotonic_ns()
        image = await self._in_thread(
            partial(decode_image, medium.data, workers.image_limits, f"media[{index}].data")
        )
        self.timings.decode_ns += time.monotonic_ns() - start
        return TileCutter(image, medium.plan, workers.image_size)

    def _cost(self, medium: Medium) -> int:
        """Bytes of the picture and of its resized canvas."""
        canvas = medium.plan.columns * medium.plan.rows * self._workers.image_size**2
        return (medium.width * medium.height + canvas) * RGB_BYTES

    async def _in_thread(self, call: partial[T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._workers.threads, call)
