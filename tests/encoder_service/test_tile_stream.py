from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256

import pytest
from PIL import Image

from encoder_service.batcher import TileBatcher
from encoder_service.media import ImageLimits, read_header
from encoder_service.pixel_budget import PixelBudget
from encoder_service.tile_cache import TileCache
from encoder_service.tile_flights import TileFlights
from encoder_service.tile_stream import (
    BATCHES_AHEAD,
    PICTURES_AHEAD,
    GrantedTile,
    Medium,
    TileStream,
    TileWorkers,
)
from encoder_service.tiling import Cutter, TileCutter, TilePlan, TilingOptions, plan_tiles
from protos.errors import InvalidRequest, ModelError, Unavailable
from tests.encoder_service.wire import SIDE, ScriptedVision, corrupt_pixels, gradient, until

BATCH_TILES = 3
MakeTiles = Callable[[Image.Image, TilePlan], Cutter]


@dataclass(frozen=True)
class Bench:
    """The parts that streams share, around a scripted tower."""

    vision: ScriptedVision
    batcher: TileBatcher
    cache: TileCache
    workers: TileWorkers

    def stream(
        self, *pictures: bytes, stream_id: int = 0, priority: int = 0, salt: bytes = b""
    ) -> TileStream:
        media = [medium_of(data) for data in pictures]
        return TileStream(stream_id, media, self.workers, priority, salt)

    @property
    def is_idle(self) -> bool:
        return not self.batcher.tiles_queued and not self.workers.pixels.used_bytes


@asynccontextmanager
async def bench(
    budget_bytes: int = 1 << 30,
    num_threads: int = 1,
    make_tiles: MakeTiles | None = None,
    cache_bytes: int = 0,
) -> AsyncIterator[Bench]:
    vision = ScriptedVision()
    batcher = TileBatcher(vision.encode, BATCH_TILES)
    cache = TileCache(cache_bytes)
    flights = TileFlights(batcher, cache)
    threads = ThreadPoolExecutor(num_threads)
    workers = TileWorkers(
        flights, PixelBudget(budget_bytes), threads, SIDE, ImageLimits(), BATCH_TILES, make_tiles
    )
    try:
        yield Bench(vision, batcher, cache, workers)
    finally:
        vision.gate.set()
        await asyncio.to_thread(batcher.close)
        cache.close()
        threads.shutdown()


@pytest.fixture
async def parts() -> AsyncIterator[Bench]:
    async with bench() as made:
        yield made
        assert made.is_idle


def medium_of(data: bytes) -> Medium:
    header = read_header(data, ImageLimits(), "data")
    plan = plan_tiles(header.width, header.height, TilingOptions(1, 12, True), SIDE)
    return Medium(data, header.width, header.height, header.decode_bytes, plan, sha256(data).digest())


def tiles(medium: int, *numbers: int) -> list[GrantedTile]:
    return [GrantedTile(medium, number) for number in numbers]


async def take_all(stream: TileStream) -> list[GrantedTile]:
    taken = []
    while (finished := await stream.next_tile()) is not None:
        taken.append(finished.granted)
    return taken


async def test_tiles_come_in_the_order_of_the_grants_and_then_none(parts: Bench) -> None:
    stream = parts.stream(gradient(0), gradient(1))
    granted = [*tiles(1, 12, 0, 5, 5, 3), *tiles(0, 2, 1), *tiles(1, 7)]
    stream.grant(granted[:4])
    stream.grant(granted[4:])
    stream.end_grants()
    assert await take_all(stream) == granted
    assert await stream.next_tile() is None
    await stream.close()


async def test_pictures_are_dropped_as_soon_as_their_last_tile_is_cut(parts: Bench) -> None:
    stream = parts.stream(gradient())
    stream.grant(tiles(0, 0))
    assert await stream.next_tile() is not None
    # The picture, as wide as its canvas, its rows resized in width, and the canvas in three forms.
    assert parts.workers.pixels.used_bytes == (4 + 4 + 10) * 3 * 4 * SIDE * SIDE
    stream.end_grants()
    await until(lambda: parts.workers.pixels.used_bytes == 0)
    assert await stream.next_tile() is None
    await stream.close()


async def test_a_picture_counts_with_what_its_decoding_takes(parts: Bench) -> None:
    """The only thread is taken, so decoding does not end."""
    gate = threading.Event()
    blocked = parts.workers.threads.submit(gate.wait)
    large = gradient(width=40 * SIDE, height=30 * SIDE)
    stream = parts.stream(large)
    stream.grant(tiles(0, 0))
    await until(lambda: parts.workers.pixels.used_bytes > 0)
    decoding = parts.workers.pixels.used_bytes
    assert decoding == read_header(large, ImageLimits(), "data").decode_bytes
    gate.set()
    await asyncio.wrap_future(blocked)
    assert await stream.next_tile() is not None
    assert 0 < parts.workers.pixels.used_bytes < decoding
    await stream.close()


async def test_a_stream_is_idle_while_all_its_tiles_are_taken_and_more_may_be_granted(parts: Bench) -> None:
    stream = parts.stream(gradient())
    await until(lambda: stream.idle_s > 0)
    stream.grant(tiles(0, 0))
    assert stream.idle_s == 0
    assert await stream.next_tile() is not None
    await until(lambda: stream.idle_s > 0)
    stream.end_grants()
    assert stream.idle_s == 0
    await stream.close()


async def test_granted_tiles_of_one_picture_go_to_the_tower_together(parts: Bench) -> None:
    parts.vision.gate.clear()
    stream = parts.stream(gradient(0), gradient(1))
    stream.grant([*tiles(0, 0, 1, 2, 3), *tiles(1, 0)])
    stream.end_grants()
    await until(lambda: parts.batcher.tiles_queued + sum(parts.vision.batches) == 5)
    parts.vision.gate.set()
    assert len(await take_all(stream)) == 5
    await stream.close()


async def test_cutting_stops_a_few_batches_ahead_of_what_is_taken(parts: Bench) -> None:
    ahead = BATCHES_AHEAD * BATCH_TILES
    stream = parts.stream(gradient())
    stream.grant(tiles(0, *range(13)))
    stream.end_grants()
    for taken in range(3):
        await asyncio.sleep(0.05)
        assert sum(parts.vision.batches) == ahead + taken
        assert await stream.next_tile() is not None
    assert len(await take_all(stream)) == 13 - 3
    await stream.close()


async def test_a_cancelled_wait_loses_no_tile(parts: Bench) -> None:
    parts.vision.gate.clear()
    stream = parts.stream(gradient())
    stream.grant(tiles(0, 4))
    stream.end_grants()
    for _ in range(3):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await stream.next_tile()
    parts.vision.gate.set()
    assert await take_all(stream) == tiles(0, 4)
    await stream.close()


async def test_a_corrupt_picture_fails_after_the_tiles_before_it(parts: Bench) -> None:
    stream = parts.stream(gradient(0), corrupt_pixels(gradient(1, format="JPEG")))
    stream.grant([*tiles(0, 0, 1), *tiles(1, 0), *tiles(0, 2)])
    for expected in tiles(0, 0, 1):
        finished = await stream.next_tile()
        assert finished is not None and finished.granted == expected
    with pytest.raises(InvalidRequest) as caught:
        await stream.next_tile()
    assert caught.value.field == "media[1].data"
    await stream.close()


async def test_fail_is_raised_before_tiles_that_are_ready(parts: Bench) -> None:
    stream = parts.stream(gradient())
    stream.grant(tiles(0, 0))
    waiting = asyncio.create_task(stream.next_tile())
    stream.fail(InvalidRequest("wrong", field="grant"))
    with pytest.raises(InvalidRequest, match="wrong"):
        await waiting
    await stream.close()


async def test_a_failed_forward_fails_the_stream(parts: Bench, caplog: pytest.LogCaptureFixture) -> None:
    parts.vision.fails = True
    stream = parts.stream(gradient())
    stream.grant(tiles(0, 0, 1, 2))
    with pytest.raises(ModelError):
        await stream.next_tile()
    await stream.close()
    assert [record.name for record in caplog.records] == ["encoder_service.batcher"]


async def test_a_closed_batcher_fails_the_stream() -> None:
    async with bench() as parts:
        stream = parts.stream(gradient())
        parts.batcher.close()
        stream.grant(tiles(0, 0))
        with pytest.raises(Unavailable):
            await stream.next_tile()
        await stream.close()
        assert parts.is_idle


async def test_close_takes_waiting_tiles_out_of_the_queue_and_drops_pictures(parts: Bench) -> None:
    parts.vision.gate.clear()
    stream = parts.stream(gradient())
    stream.grant(tiles(0, *range(13)))
    await until(lambda: parts.batcher.tiles_queued == (BATCHES_AHEAD - 1) * BATCH_TILES)
    await stream.close()
    await until(lambda: parts.is_idle)
    assert parts.vision.batches == [BATCH_TILES]


async def test_close_while_a_decoder_is_waited_for_never_decodes(parts: Bench) -> None:
    """The only thread is taken."""
    gate = threading.Event()
    blocked = parts.workers.threads.submit(gate.wait)
    stream = parts.stream(gradient())
    stream.grant(tiles(0, 0))
    await until(lambda: parts.workers.pixels.used_bytes > 0)
    await asyncio.wait_for(stream.close(), 1)
    assert parts.is_idle
    gate.set()
    await asyncio.wrap_future(blocked)
    assert parts.vision.batches == []


async def test_a_cancelled_caller_waits_for_a_thread_that_has_begun(parts: Bench) -> None:
    begun, gate = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        gate.wait(5)

    caller = asyncio.create_task(parts.workers.in_thread(partial(work)))
    await until(begun.is_set)
    caller.cancel()
    await asyncio.sleep(0.02)
    assert not caller.done()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await caller


async def test_two_streams_alternate_over_a_budget_for_one_picture() -> None:
    async with bench(budget_bytes=300_000) as parts:  # 169,344 bytes a picture
        streams = [parts.stream(gradient(0), gradient(1), stream_id=number) for number in range(2)]
        order = [*tiles(0, *range(13)), *tiles(1, *range(13)), *tiles(0, 3)]
        for stream in streams:
            stream.grant(order)
            stream.end_grants()
        assert await asyncio.gather(*(take_all(stream) for stream in streams)) == [order, order]
        for stream in streams:
            await stream.close()
        assert parts.is_idle


async def test_timings_are_sums_over_tiles(parts: Bench) -> None:
    stream = parts.stream(gradient())
    stream.grant(tiles(0, 0, 1))
    stream.end_grants()
    await take_all(stream)
    timings = stream.timings
    assert min(timings.decode_ns, timings.tile_ns, timings.queue_ns, timings.encode_ns) > 0
    await stream.close()


class Maker:
    """Makes tiles as a GPU does, while decoding: when `gate` is open, and says how many wait for it."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.num_waiting = 0
        self.lock = threading.Lock()

    def __call__(self, image: Image.Image, plan: TilePlan) -> Cutter:
        with self.lock:
            self.num_waiting += 1
        assert self.gate.wait(5)
        with self.lock:
            self.num_waiting -= 1
        return TileCutter(image, plan, SIDE)


async def test_pictures_of_one_stream_are_decoded_at_a_time_and_their_tiles_stay_in_order() -> None:
    maker = Maker()
    async with bench(num_threads=PICTURES_AHEAD + 2, make_tiles=maker) as parts:
        small = [gradient(seed, SIDE, SIDE) for seed in range(PICTURES_AHEAD + 2)]
        stream = parts.stream(*small)
        order = [GrantedTile(medium, 0) for medium in range(len(small))]
        stream.grant(order)
        stream.end_grants()
        await until(lambda: maker.num_waiting == PICTURES_AHEAD)
        await asyncio.sleep(0.02)
        assert maker.num_waiting == PICTURES_AHEAD
        maker.gate.set()
        assert await take_all(stream) == order
        await stream.close()
        assert parts.is_idle


async def test_tiles_granted_while_their_picture_is_decoded_are_cut_with_the_first_ones() -> None:
    maker = Maker()
    async with bench(make_tiles=maker) as parts:
        stream = parts.stream(gradient(0), gradient(1))
        stream.grant(tiles(0, 4))
        await until(lambda: maker.num_waiting == 1)
        stream.grant([*tiles(0, 5, 6, 7), *tiles(1, 0)])
        stream.end_grants()
        maker.gate.set()
        assert await take_all(stream) == [*tiles(0, 4, 5, 6, 7), *tiles(1, 0)]
        await stream.close()


async def test_tiles_that_are_made_at_once_count_and_the_picture_does_not() -> None:
    maker = Maker()
    maker.gate.set()
    async with bench(make_tiles=maker) as parts:
        stream = parts.stream(gradient())
        stream.grant(tiles(0, 0))
        assert await stream.next_tile() is not None
        assert parts.workers.pixels.used_bytes == 13 * 3 * SIDE * SIDE
        await stream.close()


async def test_closing_while_several_pictures_are_decoded_leaves_nothing() -> None:
    maker = Maker()
    async with bench(num_threads=2, make_tiles=maker) as parts:
        stream = parts.stream(*(gradient(seed) for seed in range(4)))
        stream.grant([GrantedTile(medium, 0) for medium in range(4)])
        await until(lambda: maker.num_waiting == 2)
        closing = asyncio.create_task(stream.close())
        await asyncio.sleep(0.02)
        assert not closing.done()  # the threads that have begun hold memory
        maker.gate.set()
        await asyncio.wait_for(closing, 2)
        assert parts.is_idle and parts.vision.batches == []


async def test_random_grants_come_in_order_whatever_is_decoded_when() -> None:
    dice = random.Random(5)
    async with bench(budget_bytes=400_000, num_threads=3) as parts:
        for number in range(12):
            stream = parts.stream(*(gradient(seed) for seed in range(4)), stream_id=number)
            order = []
            for _ in range(8):
                medium, first = dice.randrange(4), dice.randrange(13)
                granted = tiles(medium, *range(first, dice.randint(first, 12) + 1))
                stream.grant(granted)
                order += granted
                await asyncio.sleep(dice.choice((0, 0, 0.002)))
            stream.end_grants()
            assert await take_all(stream) == order
            await stream.close()
            assert parts.is_idle
