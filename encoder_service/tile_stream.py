"""The granted tiles of one stream: decoded, cut and encoded ahead, handed out in the order of the grants."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from encoder_service.batcher import EncodedTile, TileBatcher
from encoder_service.media import ImageLimits, decode_image
from encoder_service.pixel_budget import PixelBudget
from encoder_service.tiling import TileCutter, TilePlan

# Per pixel: Pillow pads RGB to 4 bytes; a canvas is resized, copied row by row and joined to an array of 3.
PICTURE_BYTES = 4
CANVAS_BYTES = 4 + 3 + 3
# Tiles cut ahead of what the client has taken, in batches: one is computed while the next is prepared.
BATCHES_AHEAD = 2

T = TypeVar("T")


@dataclass(frozen=True)
class Medium:
    """A picture of which only the header has been read."""

    data: bytes
    width: int  # pixels, after EXIF rotation
    height: int  # pixels, after EXIF rotation
    decode_bytes: int
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
    batch_tiles: int  # of one forward

    async def in_thread(self, call: partial[T]) -> T:
        """Run on a decoding thread.

        A cancelled caller waits for a call that has begun, so that its memory stays accounted for.
        """
        running = self.threads.submit(call)
        future = asyncio.wrap_future(running)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            if not running.cancel():
                await asyncio.wait([future])
            raise


class TileStream:
    """One consumer.  Cutting runs at most BATCHES_AHEAD in front of what it has taken: that bounds memory."""

    def __init__(self, stream_id: int, media: Sequence[Medium], workers: TileWorkers, priority: int) -> None:
        self.timings = StreamTimings()
        self._stream_id = stream_id
        self._media = media
        self._workers = workers
        self._priority = priority
        self._granted: deque[GrantedTile] = deque()
        self._submitted: deque[tuple[GrantedTile, asyncio.Future[EncodedTile]]] = deque()
        self._num_outstanding = 0  # granted and not yet taken
        self._active_at = time.monotonic()  # a tile was last granted or taken
        self._is_complete = False
        self._failure: Exception | None = None
        self._has_work = asyncio.Event()  # for the pump: more grants, more room, or the end of both
        self._has_result = asyncio.Event()  # for the consumer
        self._pump = asyncio.create_task(self._cut_and_submit())
        self._pump.add_done_callback(self._wake_consumer)

    @property
    def num_waiting(self) -> int:
        """Tiles granted and not yet cut."""
        return len(self._granted)

    @property
    def idle_s(self) -> float:
        """How long the consumer has had every granted tile and has granted no other."""
        return 0.0 if self._num_outstanding or self._is_complete else time.monotonic() - self._active_at

    def grant(self, tiles: Sequence[GrantedTile]) -> None:
        self._granted.extend(tiles)
        self._num_outstanding += len(tiles)
        self._active_at = time.monotonic()
        self._has_work.set()

    def end_grants(self) -> None:
        self._is_complete = True
        self._has_work.set()

    def fail(self, error: Exception) -> None:
        """`next_tile` raises this instead of what it would return next."""
        self._failure = error
        self._has_result.set()

    async def next_tile(self) -> FinishedTile | None:
        """The next granted tile, or None when all grants have been served.  Cancelling it loses nothing.

        Raises:
            InvalidRequest: the picture turned out to be corrupt; the field names it.
            ModelError, Unavailable: the tower failed, or is shutting down.
        """
        while not self._is_decided():
            self._has_result.clear()
            await self._has_result.wait()
        if self._failure is not None:
            raise self._failure
        if not self._submitted:
            self._pump.result()  # raises what was wrong with the tile after the last one
            return None
        granted, future = self._submitted.popleft()
        self._has_work.set()
        encoded = future.result()
        self.timings.queue_ns += encoded.queue_ns
        self.timings.encode_ns += encoded.encode_ns
        self._num_outstanding -= 1
        self._active_at = time.monotonic()
        return FinishedTile(granted, encoded.embeds)

    async def close(self) -> None:
        """Take waiting tiles out of the batcher's queue and drop the decoded pictures."""
        self._pump.cancel()
        for _, future in self._submitted:
            if not future.cancel():
                future.exception()  # retrieved: nobody is left to hear of it
        await asyncio.wait([self._pump])
        if not self._pump.cancelled():
            self._pump.exception()
        self._failure = None  # its traceback holds this stream

    def _is_decided(self) -> bool:
        """Whether it is known what comes next."""
        if self._submitted:
            return self._failure is not None or self._submitted[0][1].done()
        return self._failure is not None or self._pump.done()

    def _wake_consumer(self, _: object) -> None:
        self._has_result.set()

    async def _cut_and_submit(self) -> None:
        """Ends with the grants, with an error or with the stream; the pictures are dropped in any case."""
        try:
            while tiles := await self._next_grants():
                pixels = await self._cut(tiles[0].medium, [granted.tile for granted in tiles])
                for granted, tile in zip(tiles, pixels, strict=True):
                    self._submit(granted, tile)
        finally:
            self._workers.pixels.forget(self._stream_id)

    def _submit(self, granted: GrantedTile, tile: torch.Tensor) -> None:
        future = self._workers.batcher.submit(tile, (self._priority, granted.tile))
        future.add_done_callback(self._wake_consumer)
        self._submitted.append((granted, future))

    async def _next_grants(self) -> list[GrantedTile]:
        """Tiles of one picture that may be cut now, at most a batch; none when all grants are served."""
        most = self._workers.batch_tiles
        while not self._granted or len(self._submitted) >= BATCHES_AHEAD * most:
            if not self._granted and self._is_complete:
                return []
            self._has_work.clear()
            await self._has_work.wait()
        tiles = [self._granted.popleft()]
        room = min(most, BATCHES_AHEAD * most - len(self._submitted))
        while self._granted and self._granted[0].medium == tiles[0].medium and len(tiles) < room:
            tiles.append(self._granted.popleft())
        return tiles

    async def _cut(self, index: int, tiles: list[int]) -> torch.Tensor:
        """uint8 [len(tiles), 3, image_size, image_size]"""
        medium = self._media[index]
        open_picture = partial(self._decode, index)
        key = (self._stream_id, index)
        async with self._workers.pixels.use(
            key, medium.decode_bytes, self._held_bytes(medium), open_picture
        ) as cutter:
            start = time.monotonic_ns()
            pixels = await self._workers.in_thread(partial(cutter.cut, tiles))
            self.timings.tile_ns += time.monotonic_ns() - start
        return pixels

    async def _decode(self, index: int) -> TileCutter:
        medium, workers = self._media[index], self._workers
        start = time.monotonic_ns()
        image = await workers.in_thread(
            partial(decode_image, medium.data, workers.image_limits, f"media[{index}].data")
        )
        self.timings.decode_ns += time.monotonic_ns() - start
        return TileCutter(image, medium.plan, workers.image_size)

    def _held_bytes(self, medium: Medium) -> int:
        """Of the decoded picture and of making its canvas, which Pillow resizes in width first."""
        canvas_width = medium.plan.columns * self._workers.image_size
        canvas_height = medium.plan.rows * self._workers.image_size
        picture = (medium.width + canvas_width) * medium.height * PICTURE_BYTES
        return picture + canvas_width * canvas_height * CANVAS_BYTES
