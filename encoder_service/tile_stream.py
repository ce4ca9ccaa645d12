"""The granted tiles of one stream: found or made ahead, and handed out in the order of the grants.

A tile that the cache holds or another stream is making costs this one neither decoding nor cutting.
"""

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

from encoder_service.containers import Containers
from encoder_service.media import ImageLimits, decode_image
from encoder_service.medium import PICTURE_BYTES, Medium, Part, Section
from encoder_service.pixel_budget import PixelBudget
from encoder_service.tile_flights import Claim, TileFlights
from encoder_service.tiling import Cutter, PartsCutter, TileCutter, TilePlan
from protos.media import MediaKind

# Per pixel: Pillow pads RGB to 4 bytes; a canvas is resized, copied row by row and joined to an array of 3.
CANVAS_BYTES = 4 + 3 + 3
# Tiles begun ahead of what the client has taken, in cuts: one is computed while the next is prepared.
CUTS_AHEAD = 2
# Tiles of one picture that are cut together, however small the tower's batches are: between two cuts the
# picture may have to make room for others, and is then decoded again.
MIN_CUT_TILES = 16
# Tiles granted and not yet begun, of one stream: several times what a request of pictures has.
MAX_WAITING_GRANTS = 16_384
# Pictures of one stream decoded at a time: one stream must not take all threads and the whole budget.
PICTURES_AHEAD = 4
# Tiles of one stream that go before the next ones of others: a picture is of use when all of it is there,
# and a stream of many pictures must not keep one of a single picture waiting.
TILES_IN_A_ROW = 16

T = TypeVar("T")
SectionKey = tuple[int, int]  # (medium, section of it)


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
    """Nanoseconds, summed over tiles; those from the cache took none."""

    decode_ns: int = 0
    tile_ns: int = 0
    queue_ns: int = 0
    encode_ns: int = 0
    transfer_ns: int = 0


@dataclass(frozen=True)
class TileWorkers:
    """What all streams of the service share."""

    flights: TileFlights
    pixels: PixelBudget
    threads: ThreadPoolExecutor
    image_size: int
    image_limits: ImageLimits
    containers: Containers
    cut_tiles: int  # most that are cut together; at least a batch of the tower
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


@dataclass(frozen=True, eq=False)
class _Begun:
    granted: GrantedTile
    claim: Claim


@dataclass(eq=False)
class _Cut:
    """Tiles of one picture, or of parts decoded together, that are cut together."""

    key: SectionKey
    tiles: list[_Begun]
    task: asyncio.Task[Iterable[torch.Tensor]]


class TileStream:
    """One consumer.  Tiles begin at most CUTS_AHEAD in front of what it has taken: that bounds memory.

    Those that nobody else is at are cut here, up to PICTURES_AHEAD pictures at a time, and go to the batcher
    in the order of the grants. None of that waits for the consumer, for other streams may wait for it.
    """

    def __init__(
        self,
        stream_id: int,
        media: Sequence[Medium],
        workers: TileWorkers,
        priority: int,
        cache_salt: bytes = b"",
    ) -> None:
        self.timings = StreamTimings()
        self._stream_id = stream_id
        self._media = media
        self._workers = workers
        self._priority = priority
        self._cache_salt = cache_salt
        self._granted: deque[GrantedTile] = deque()  # not yet begun
        self._begun: deque[_Begun] = deque()  # and not yet taken, in the order of the grants
        self._to_cut: deque[_Begun] = deque()  # led by this stream, not yet part of a cut
        self._cuts: deque[_Cut] = deque()  # not yet submitted, in the order in which they began
        self._num_begun = 0  # since the start
        self._num_outstanding = 0  # granted and not yet taken
        self._active_at = time.monotonic()  # a tile was last granted or taken
        self._is_complete = False
        self._is_ending = self._is_closed = False
        self._failure: Exception | None = None
        self._cut_failure: Exception | None = None  # that ended the pump
        self._has_work = asyncio.Event()  # for new cuts: tiles to cut, less under way, or the end of both
        self._has_cut = asyncio.Event()  # for the pump: a cut has begun, or none will
        self._has_result = asyncio.Event()  # for the consumer
        self._pump = asyncio.create_task(self._cut_and_submit())
        self._pump.add_done_callback(self._wake_consumer)

    @property
    def num_waiting(self) -> int:
        """Tiles granted and not yet begun."""
        return len(self._granted)

    @property
    def idle_s(self) -> float:
        """How long the consumer has had every granted tile and has granted no other."""
        return 0.0 if self._num_outstanding or self._is_complete else time.monotonic() - self._active_at

    @property
    def has_tile(self) -> bool:
        """`next_tile` would return one without waiting."""
        if self._failure is not None or not self._begun:
            return False
        future = self._begun[0].claim.result
        return future.done() and not future.cancelled() and future.exception() is None

    def grant(self, tiles: Sequence[GrantedTile]) -> None:
        self._granted.extend(tiles)
        self._num_outstanding += len(tiles)
        self._active_at = time.monotonic()
        self._begin()

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
        if not self._begun:
            self._pump.result()  # raises what was wrong with the tile after the last one
            return None
        cut_tiles = self._workers.cut_tiles
        encoded = self._begun[0].claim.result.result()
        granted = self._begun.popleft().granted
        self.timings.queue_ns += encoded.queue_ns
        self.timings.encode_ns += encoded.encode_ns
        self.timings.transfer_ns += encoded.transfer_ns
        self._num_outstanding -= 1
        self._active_at = time.monotonic()
        # Half a cut at a time: each beginning may start one.
        if len(self._begun) <= CUTS_AHEAD * cut_tiles - max(cut_tiles // 2, 1):
            self._begin()
        return FinishedTile(granted, encoded.embeds)

    async def close(self) -> None:
        """Give up what nobody else waits for, leave the rest to others, and drop the decoded pictures."""
        self._is_closed = True
        for begun in self._begun:
            self._workers.flights.leave(begun.claim)
        self._begun.clear()  # claims know this stream, too: its pictures must not wait for the collector
        self._to_cut.clear()
        if not self._is_ending:  # it must not be interrupted while it waits for its cuts
            self._pump.cancel()
        await asyncio.wait([self._pump])
        if not self._pump.cancelled():
            self._pump.exception()
        self._failure = self._cut_failure = None  # their tracebacks hold this stream

    def _is_decided(self) -> bool:
        """Whether it is known what comes next."""
        if self._begun:
            return self._failure is not None or self._begun[0].claim.result.done()
        return self._failure is not None or self._pump.done()

    def _wake_consumer(self, _: object) -> None:
        self._has_result.set()

    def _begin(self) -> None:
        """Claim granted tiles, as many as may be ahead of the consumer."""
        flights = self._workers.flights
        most = 0 if self._is_closed else CUTS_AHEAD * self._workers.cut_tiles
        while self._granted and len(self._begun) < most:
            granted = self._granted.popleft()
            key = (self._cache_salt, self._media[granted.medium].content_hash, granted.tile)
            order = (self._priority, self._num_begun // TILES_IN_A_ROW)
            self._num_begun += 1
            claim = flights.claim(key, order, partial(self._lead, granted))
            self._begun.append(_Begun(granted, claim))
            claim.result.add_done_callback(self._wake_consumer)
        self._has_work.set()

    def _lead(self, granted: GrantedTile, claim: Claim) -> None:
        """Nobody else is at this tile, or not any more."""
        if self._cut_failure is not None:
            self._workers.flights.fail(claim, self._cut_failure)
        else:
            self._to_cut.append(_Begun(granted, claim))
            self._has_work.set()

    async def _cut_and_submit(self) -> None:
        """Ends with the grants, with an error or with the stream; the pictures are dropped in any case."""
        beginning = asyncio.create_task(self._begin_cuts())
        try:
            while cut := await self._next_cut(beginning):
                pixels = await cut.task
                for begun, tile in zip(cut.tiles, pixels, strict=True):
                    self._workers.flights.submit(begun.claim, tile)
                self._cuts.popleft()
                self._has_work.set()
        except Exception as error:
            self._fail_cuts(error)
            raise
        finally:
            self._is_ending = True
            await self._abandon([beginning, *(cut.task for cut in self._cuts)])
            self._workers.pixels.forget(self._stream_id)

    def _fail_cuts(self, error: Exception) -> None:
        """What this stream leads comes to an end here; others take over where they wait."""
        self._cut_failure = error
        tiles = [begun for cut in self._cuts for begun in cut.tiles]
        for begun in [*tiles, *self._to_cut]:
            if begun.claim.leads:
                self._workers.flights.fail(begun.claim, error)
        self._to_cut.clear()

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

    async def _begin_cuts(self) -> None:
        """Start a cut for every picture with tiles to cut, in their order, until none can follow."""
        try:
            while await self._may_cut():
                key = self._key(self._to_cut[0].granted)
                running = [cut.task for cut in self._cuts if cut.key == key and not cut.task.done()]
                if running:  # one user of a picture at a time; it may take these tiles, too
                    await asyncio.wait(running)
                    continue
                tiles = self._take_tiles(key)
                task = asyncio.create_task(self._cut(key, tiles))
                self._cuts.append(_Cut(key, tiles, task))
                self._has_cut.set()
        finally:
            self._has_cut.set()

    async def _may_cut(self) -> bool:
        """Wait until there are tiles to cut and few enough pictures are; False when there will be none."""
        while not self._to_cut or len(self._cuts) >= PICTURES_AHEAD:
            if not self._to_cut and self._is_complete and not self._granted and not self._may_lead():
                return False
            self._has_work.clear()
            await self._has_work.wait()
        return True

    def _may_lead(self) -> bool:
        """Whether this stream waits for one that may leave before it has cut."""
        return any(begun.claim.may_lead for begun in self._begun)

    def _key(self, granted: GrantedTile) -> SectionKey:
        return granted.medium, self._media[granted.medium].section_of(granted.tile)

    def _take_tiles(self, key: SectionKey, num_taken: int = 0) -> list[_Begun]:
        """The next tiles to cut as far as they are this section's, at most a cut with the `num_taken`."""
        tiles: list[_Begun] = []
        most = self._workers.cut_tiles - num_taken
        while self._to_cut and self._key(self._to_cut[0].granted) == key and len(tiles) < most:
            tiles.append(self._to_cut.popleft())
        return tiles

    async def _cut(self, key: SectionKey, tiles: list[_Begun]) -> Iterable[torch.Tensor]:
        """A uint8 [3, image_size, image_size] of each of `tiles`, which may have grown meanwhile."""
        section = self._media[key[0]].sections[key[1]]
        open_section = partial(self._decode, key)
        async with self._workers.pixels.use(
            (self._stream_id, *key), section.decode_bytes, self._held_bytes(section), open_section
        ) as cutter:
            if self._cuts[-1].tiles is tiles:  # granted during the decoding, and next in order: join the cut
                tiles += self._take_tiles(key, len(tiles))
            wanted = [begun.granted.tile - section.first_tile for begun in tiles]
            if self._workers.make_tiles is not None:  # they are made: not worth waiting for a thread
                return cutter.cut(wanted)
            pixels, tile_ns = await self._workers.in_thread(partial(_timed, partial(cutter.cut, wanted)))
            self.timings.tile_ns += tile_ns
            return pixels

    async def _decode(self, key: SectionKey) -> Cutter:
        medium, workers = self._media[key[0]], self._workers
        section, field = medium.sections[key[1]], f"media[{key[0]}].data"
        if medium.kind is MediaKind.IMAGE:
            decode: Callable[[], list[Image.Image]] = partial(
                _decode_picture, medium.data, workers.image_limits, field
            )
        else:
            start = time.monotonic_ns()
            stored = [part.stored for part in section.parts if part.stored is not None]
            pixels = await workers.containers.read(medium.format, medium.data, stored, field)
            self.timings.decode_ns += time.monotonic_ns() - start
            decode = pixels.images
        make = workers.make_tiles or partial(TileCutter, image_size=workers.image_size)
        cutter, decode_ns, tile_ns = await workers.in_thread(
            partial(_decode_and_make, decode, make, section.parts)
        )
        self.timings.decode_ns += decode_ns
        self.timings.tile_ns += tile_ns
        return cutter

    def _held_bytes(self, section: Section) -> int:
        return sum(map(self._part_bytes, section.parts))

    def _part_bytes(self, part: Part) -> int:
        """Of the tiles on the GPU; or of the decoded picture and of making its canvas, in width first."""
        side = self._workers.image_size
        if self._workers.make_tiles is not None:
            return part.plan.num_tiles * 3 * side * side
        canvas_width, canvas_height = part.plan.columns * side, part.plan.rows * side
        picture = (part.width + canvas_width) * part.height * PICTURE_BYTES
        return picture + canvas_width * canvas_height * CANVAS_BYTES


def _timed(call: Callable[[], T]) -> tuple[T, int]:
    """Its result and the nanoseconds that it took, waiting for a thread not counted."""
    start = time.monotonic_ns()
    return call(), time.monotonic_ns() - start


def _decode_picture(data: bytes, limits: ImageLimits, field: str) -> list[Image.Image]:
    return [decode_image(data, limits, field)]


def _decode_and_make(
    decode: Callable[[], list[Image.Image]],
    make: Callable[[Image.Image, TilePlan], Cutter],
    parts: Sequence[Part],
) -> tuple[Cutter, int, int]:
    """Both in one visit to a thread: decoded pictures end with it.  Nanoseconds of either."""
    images, decode_ns = _timed(decode)
    plans = [part.plan for part in parts]
    cutter, tile_ns = _timed(partial(_cutter, images, make, plans))
    return cutter, decode_ns, tile_ns


def _cutter(
    images: Sequence[Image.Image], make: Callable[[Image.Image, TilePlan], Cutter], plans: Sequence[TilePlan]
) -> Cutter:
    cutters = [make(image, plan) for image, plan in zip(images, plans, strict=True)]
    return cutters[0] if len(cutters) == 1 else PartsCutter(cutters, [plan.num_tiles for plan in plans])
