"""The granted tiles of one stream: decoded, cut and encoded ahead, handed out in the order of the grants."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from PIL import Image

from encoder_service.batcher import EncodedTile, TileBatcher
from encoder_service.media import ImageLimits, decode_image
from encoder_service.pixel_budget import PixelBudget
from encoder_service.tiling import Cutter, TileCutter, TilePlan

# Per pixel: Pillow pads RGB to 4 bytes; a canvas is resized, copied row by row and joined to an array of 3.
PICTURE_BYTES = 4
CANVAS_BYTES = 4 + 3 + 3
# Tiles cut ahead of what the client has taken, in batches: one is computed while the next is prepared.
BATCHES_AHEAD = 2
# Pictures of one stream decoded at a time: one stream must not take all threads and the whole budget.
PICTURES_AHEAD = 4

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
    transfer_ns: int = 0


@dataclass(frozen=True)
class TileWorkers:
    """What all streams of the service share."""

    batcher: TileBatcher
    pixels: PixelBudget
    threads: ThreadPoolExecutor
    image_size: int
    image_limits: ImageLimits
    batch_tiles: int  # of one forward
    # Makes all tiles of a decoded picture on the GPU; None: they are cut on the CPU, as they are wanted.
    make_tiles: Callable[[Image.Image, TilePlan], Cutter] | None = None

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


@dataclass(eq=False)
class _Cut:
    """Tiles of one picture that are cut together."""

    medium: int
    tiles: list[GrantedTile]
    task: asyncio.Task[Iterable[torch.Tensor]]


class TileStream:
    """One consumer.  Cutting runs at most BATCHES_AHEAD in front of what it has taken: that bounds memory.

    Up to PICTURES_AHEAD pictures are decoded at a time; their tiles go to the batcher in the order of the
    grants.
    """

    def __init__(self, stream_id: int, media: Sequence[Medium], workers: TileWorkers, priority: int) -> None:
        self.timings = StreamTimings()
        self._stream_id = stream_id
        self._media = media
        self._workers = workers
        self._priority = priority
        self._granted: deque[GrantedTile] = deque()
        self._submitted: deque[tuple[GrantedTile, asyncio.Future[EncodedTile]]] = deque()
        self._cuts: deque[_Cut] = deque()  # not yet submitted, in the order of the grants
        self._num_outstanding = 0  # granted and not yet taken
        self._active_at = time.monotonic()  # a tile was last granted or taken
        self._is_complete = False
        self._is_ending = False
        self._failure: Exception | None = None
        self._has_work = asyncio.Event()  # for new cuts: more grants, more room, or the end of both
        self._has_cut = asyncio.Event()  # for the pump: a cut has begun, or none will
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
        self.timings.transfer_ns += encoded.transfer_ns
        self._num_outstanding -= 1
        self._active_at = time.monotonic()
        return FinishedTile(granted, encoded.embeds)

    async def close(self) -> None:
        """Take waiting tiles out of the batcher's queue and drop the decoded pictures."""
        if not self._is_ending:  # it must not be interrupted while it waits for its cuts
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
        beginning = asyncio.create_task(self._begin_cuts())
        try:
            while cut := await self._next_cut(beginning):
                pixels = await cut.task
                self._cuts.popleft()
                self._has_work.set()
                for granted, tile in zip(cut.tiles, pixels, strict=True):
                    self._submit(granted, tile)
        finally:
            self._is_ending = True
            await self._abandon([beginning, *(cut.task for cut in self._cuts)])
            self._workers.pixels.forget(self._stream_id)

    async def _next_cut(self, beginning: asyncio.Task[None]) -> _Cut | None:
        """The oldest cut, begun or done; None when all grants are served."""
        while not self._cuts:
            if beginning.done():
                beginning.result()
                return None
            self._has_cut.clear()
            await self._has_cut.wait()
        return self._cuts[0]

    async def _abandon(self, tasks: Sequence[asyncio.Task[Any]]) -> None:
        """Cancel them and wait until they have let go of their pictures."""
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._cuts.clear()

    def _submit(self, granted: GrantedTile, tile: torch.Tensor) -> None:
        future = self._workers.batcher.submit(tile, (self._priority, granted.tile))
        future.add_done_callback(self._wake_consumer)
        self._submitted.append((granted, future))

    async def _begin_cuts(self) -> None:
        """Start a cut for every picture in the order of the grants, until they end."""
        try:
            while await self._may_begin():
                medium = self._granted[0].medium
                running = [cut.task for cut in self._cuts if cut.medium == medium and not cut.task.done()]
                if running:  # one user of a picture at a time; it may take these tiles, too
                    await asyncio.wait(running)
                    continue
                tiles = self._take_grants(medium)
                task = asyncio.create_task(self._cut(medium, tiles))
                self._cuts.append(_Cut(medium, tiles, task))
                self._has_cut.set()
        finally:
            self._has_cut.set()

    async def _may_begin(self) -> bool:
        """Wait until a tile is granted and may be cut; False when all grants are served."""
        while not self._granted or self._room() < 1 or len(self._cuts) >= PICTURES_AHEAD:
            if not self._granted and self._is_complete:
                return False
            self._has_work.clear()
            await self._has_work.wait()
        return True

    def _room(self) -> int:
        """Tiles that may still be cut ahead of the consumer."""
        ahead = len(self._submitted) + sum(len(cut.tiles) for cut in self._cuts)
        return BATCHES_AHEAD * self._workers.batch_tiles - ahead

    def _take_grants(self, medium: int, num_taken: int = 0) -> list[GrantedTile]:
        """The next granted tiles as far as they are this picture's, at most a batch with the `num_taken`."""
        most = min(self._room(), self._workers.batch_tiles - num_taken)
        tiles: list[GrantedTile] = []
        while self._granted and self._granted[0].medium == medium and len(tiles) < most:
            tiles.append(self._granted.popleft())
        return tiles

    async def _cut(self, index: int, tiles: list[GrantedTile]) -> Iterable[torch.Tensor]:
        """A uint8 [3, image_size, image_size] of each of `tiles`, which may have grown meanwhile."""
        medium = self._media[index]
        open_picture = partial(self._decode, index)
        key = (self._stream_id, index)
        async with self._workers.pixels.use(
            key, medium.decode_bytes, self._held_bytes(medium), open_picture
        ) as cutter:
            if self._cuts[-1].tiles is tiles:  # granted during the decoding, and next in order: join the cut
                tiles += self._take_grants(index, len(tiles))
            wanted = [granted.tile for granted in tiles]
            if self._workers.make_tiles is not None:  # they are made: not worth waiting for a thread
                return cutter.cut(wanted)
            pixels, tile_ns = await self._workers.in_thread(partial(_timed, partial(cutter.cut, wanted)))
            self.timings.tile_ns += tile_ns
            return pixels

    async def _decode(self, index: int) -> Cutter:
        medium, workers = self._media[index], self._workers
        decode = partial(decode_image, medium.data, workers.image_limits, f"media[{index}].data")
        if workers.make_tiles is None:
            image, decode_ns = await workers.in_thread(partial(_timed, decode))
            cutter: Cutter = TileCutter(image, medium.plan, workers.image_size)
        else:
            make = partial(_decode_and_make, decode, workers.make_tiles, medium.plan)
            cutter, decode_ns, tile_ns = await workers.in_thread(make)
            self.timings.tile_ns += tile_ns
        self.timings.decode_ns += decode_ns
        return cutter

    def _held_bytes(self, medium: Medium) -> int:
        """Of the tiles on the GPU; or of the decoded picture and of making its canvas, in width first."""
        side = self._workers.image_size
        if self._workers.make_tiles is not None:
            return medium.plan.num_tiles * 3 * side * side
        canvas_width, canvas_height = medium.plan.columns * side, medium.plan.rows * side
        picture = (medium.width + canvas_width) * medium.height * PICTURE_BYTES
        return picture + canvas_width * canvas_height * CANVAS_BYTES


def _timed(call: Callable[[], T]) -> tuple[T, int]:
    """Its result and the nanoseconds that it took, waiting for a thread not counted."""
    start = time.monotonic_ns()
    return call(), time.monotonic_ns() - start


def _decode_and_make(
    decode: Callable[[], Image.Image], make: Callable[[Image.Image, TilePlan], Cutter], plan: TilePlan
) -> tuple[Cutter, int, int]:
    """Both in one visit to a thread: the decoded picture ends with it.  Nanoseconds of either."""
    image, decode_ns = _timed(decode)
    cutter, tile_ns = _timed(partial(make, image, plan))
    return cutter, decode_ns, tile_ns
