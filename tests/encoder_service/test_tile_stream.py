from __future__ import annotations

import asyncio
import gc
import random
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Any

import pytest
import torch
from PIL import Image

from encoder_service.batch_size import BatchSizes
from encoder_service.batcher import TileBatcher
from encoder_service.container_limits import ContainerLimits
from encoder_service.containers import Containers
from encoder_service.media import ImageLimits, decode_image, read_header
from encoder_service.medium import Medium, Part
from encoder_service.pixel_budget import PixelBudget
from encoder_service.tile_cache import TileCache
from encoder_service.tile_flights import TileFlights
from encoder_service.tile_stream import (
    CUTS_AHEAD,
    PICTURES_AHEAD,
    TILES_IN_A_ROW,
    GrantedTile,
    StreamTimings,
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
    batcher = TileBatcher(vision.encode, BatchSizes(BATCH_TILES, BATCH_TILES))
    cache = TileCache(cache_bytes)
    flights = TileFlights(batcher, cache)
    threads = ThreadPoolExecutor(num_threads)
    containers = Containers(ContainerLimits())
    workers = TileWorkers(
        flights, PixelBudget(budget_bytes), threads, SIDE, ImageLimits(), containers, BATCH_TILES, make_tiles
    )
    try:
        yield Bench(vision, batcher, cache, workers)
    finally:
        vision.gate.set()
        containers.close()
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
    part = Part(header.width, header.height, plan)
    return Medium.picture(data, sha256(data).digest(), part, header.decode_bytes)


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


async def test_a_stream_of_many_tiles_gives_way_to_others_after_its_turn(parts: Bench) -> None:
    stream = parts.stream(*(gradient(seed) for seed in range(5)))
    stream.grant([GrantedTile(medium, tile) for medium in range(5) for tile in range(4)])
    for _ in range(TILES_IN_A_ROW - BATCH_TILES):
        await stream.next_tile()
    ahead = CUTS_AHEAD * BATCH_TILES
    turns = [begun.claim.order for begun in stream._begun]
    assert turns == [(0, 0)] * BATCH_TILES + [(0, 1)] * (ahead - BATCH_TILES)
    await stream.close()


def has_encoded(parts: Bench, num_tiles: int) -> bool:
    return sum(parts.vision.batches) >= num_tiles


async def test_cutting_stops_a_few_batches_ahead_of_what_is_taken(parts: Bench) -> None:
    ahead = CUTS_AHEAD * BATCH_TILES
    stream = parts.stream(gradient())
    stream.grant(tiles(0, *range(13)))
    stream.end_grants()
    for taken in range(3):
        await until(partial(has_encoded, parts, ahead + taken))
        await asyncio.sleep(0.02)  # in which more would come
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
    await until(lambda: parts.batcher.tiles_queued == (CUTS_AHEAD - 1) * BATCH_TILES)
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
        self.num_waiting = self.num_made = 0
        self.lock = threading.Lock()

    def __call__(self, image: Image.Image, plan: TilePlan) -> Cutter:
        with self.lock:
            self.num_waiting += 1
        assert self.gate.wait(5)
        with self.lock:
            self.num_waiting -= 1
            self.num_made += 1
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


@pytest.mark.parametrize("is_read", [True, False])
async def test_nothing_refers_to_a_closed_stream(parts: Bench, is_read: bool) -> None:
    """Its pictures must not wait for the garbage collector."""
    stream = parts.stream(gradient())
    parts.vision.gate.clear()
    stream.grant(tiles(0, *range(5)))
    stream.end_grants()
    await until(lambda: parts.batcher.tiles_queued + sum(parts.vision.batches) == 5)
    if is_read:
        parts.vision.gate.set()
        await take_all(stream)
    gc.disable()
    try:
        await stream.close()
        closed = weakref.ref(stream)
        del stream
        parts.vision.gate.set()
        await until(lambda: closed() is None)
    finally:
        gc.enable()


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


async def served(
    parts: Bench, order: Sequence[GrantedTile], *pictures: bytes, **of_stream: Any
) -> TileStream:
    """A stream that was granted `order` and nothing more, read to its end; the tiles were right."""
    stream = parts.stream(*pictures, **of_stream)
    stream.grant(order)
    stream.end_grants()
    assert await take_checked(stream, *pictures) == list(order)
    await stream.close()
    return stream


async def take_checked(stream: TileStream, *pictures: bytes) -> list[GrantedTile]:
    """All tiles; each has its own picture's embeddings."""
    cutters = [
        TileCutter(decode_image(data, ImageLimits(), "data"), medium_of(data).parts[0].plan, SIDE)
        for data in pictures
    ]
    taken = []
    while (finished := await stream.next_tile()) is not None:
        granted = finished.granted
        pixels = cutters[granted.medium].cut([granted.tile])[0]
        assert float(finished.embeds[0, 0]) == pytest.approx(float(pixels.float().mean()))
        taken.append(granted)
    return taken


class TestCachedTiles:
    async def test_of_a_whole_picture_cost_neither_decode_nor_cut_nor_forward(self) -> None:
        maker = Maker()
        maker.gate.set()
        async with bench(cache_bytes=1 << 20, make_tiles=maker) as parts:
            await served(parts, tiles(0, *range(13)), gradient())
            encoded = sum(parts.vision.batches)
            maker.gate.clear()  # decoding would not end
            stream = await served(parts, tiles(0, *range(13)), gradient(), stream_id=1)
            assert sum(parts.vision.batches) == encoded == 13
            assert stream.timings == StreamTimings()
            assert parts.cache.host.num_hits == 13 and parts.is_idle

    async def test_are_found_while_the_pixel_budget_is_full(self) -> None:
        maker = Maker()
        maker.gate.set()
        async with bench(budget_bytes=1, num_threads=2, cache_bytes=1 << 20, make_tiles=maker) as parts:
            await served(parts, tiles(0, 1, 2), gradient())
            maker.gate.clear()
            blocking = parts.stream(gradient(1), stream_id=1)
            blocking.grant(tiles(0, 0))
            await until(lambda: maker.num_waiting == 1)
            assert parts.workers.pixels.used_bytes == 1
            await asyncio.wait_for(served(parts, tiles(0, 2, 1), gradient(), stream_id=2), 5)
            assert maker.num_waiting == 1
            maker.gate.set()
            await blocking.close()

    async def test_come_in_their_place_among_those_that_are_made(self) -> None:
        async with bench(cache_bytes=1 << 20) as parts:
            await served(parts, [*tiles(0, 1, 4), *tiles(1, 0, 3)], gradient(0), gradient(1))
            order = [*tiles(0, *range(6)), *tiles(1, *range(5))]
            await served(parts, order, gradient(0), gradient(1), stream_id=1)
            assert sum(parts.vision.batches) == 4 + len(order) - 4

    async def test_of_another_salt_are_made_again(self) -> None:
        async with bench(cache_bytes=1 << 20) as parts:
            for stream_id, salt in enumerate((b"", b"a tenant", b"another", b"a tenant")):
                await served(parts, tiles(0, 0, 1), gradient(), stream_id=stream_id, salt=salt)
            assert sum(parts.vision.batches) == 3 * 2

    async def test_that_had_to_go_are_made_again_and_no_others(self) -> None:
        async with bench(cache_bytes=4 * 8 * 3) as parts:  # three tiles
            await served(parts, tiles(0, 0, 1, 2, 3), gradient())
            await served(parts, tiles(0, 2, 3, 0), gradient(), stream_id=1)
            assert sum(parts.vision.batches) == 4 + 1

    async def test_wait_for_the_consumer_like_others(self) -> None:
        """What a stream holds beyond the cache's bound is bounded, too."""
        async with bench(cache_bytes=1 << 20) as parts:
            await served(parts, tiles(0, *range(13)), gradient())
            stream = parts.stream(gradient(), stream_id=1)
            stream.grant(tiles(0, *range(13)))
            assert stream.num_waiting == 13 - CUTS_AHEAD * BATCH_TILES
            await stream.close()


class TestTilesThatSeveralStreamsWant:
    async def test_are_decoded_and_made_once(self) -> None:
        maker = Maker()
        async with bench(num_threads=4, make_tiles=maker) as parts:
            serving = [
                asyncio.create_task(served(parts, tiles(0, *range(6)), gradient(), stream_id=number))
                for number in range(5)
            ]
            await until(lambda: parts.workers.flights.num_joins == 4 * 6)
            await until(lambda: maker.num_waiting == 1)
            maker.gate.set()
            await asyncio.gather(*serving)
            assert (maker.num_made, sum(parts.vision.batches)) == (1, 6) and parts.is_idle

    async def test_are_taken_over_when_the_one_that_decodes_closes(self) -> None:
        maker = Maker()
        async with bench(num_threads=2, make_tiles=maker) as parts:
            leader = parts.stream(gradient())
            leader.grant(tiles(0, 0, 1, 2))
            await until(lambda: maker.num_waiting == 1)
            waiters = [
                asyncio.create_task(served(parts, tiles(0, *wanted), gradient(), stream_id=number))
                for number, wanted in ((1, (0, 1)), (2, (2, 1, 0)))
            ]
            await until(lambda: parts.workers.flights.num_joins == 5)
            closing = asyncio.create_task(leader.close())
            await until(lambda: maker.num_waiting == 2)  # a waiter decodes before the leader's thread is back
            maker.gate.set()
            await asyncio.wait_for(asyncio.gather(closing, *waiters), 5)
            assert sum(parts.vision.batches) == 3 and parts.is_idle

    async def test_are_made_for_the_others_when_the_one_that_cut_them_closes(self) -> None:
        async with bench() as parts:
            parts.vision.gate.clear()
            leader = parts.stream(gradient())
            leader.grant(tiles(0, 0, 1, 2, 3))
            await until(lambda: parts.batcher.tiles_queued + sum(parts.vision.batches) == 4)
            waiter = asyncio.create_task(served(parts, tiles(0, 3, 0), gradient(), stream_id=1))
            await until(lambda: parts.workers.flights.num_joins == 2)
            await leader.close()
            parts.vision.gate.set()
            await asyncio.wait_for(waiter, 5)
            assert sum(parts.vision.batches) <= 4 and parts.is_idle

    async def test_go_to_the_tower_by_the_best_priority_of_those_streams(self, parts: Bench) -> None:
        parts.vision.gate.clear()
        first = parts.stream(gradient(1), stream_id=9)
        first.grant(tiles(0, 0))
        await until(lambda: parts.vision.batches == [1])
        streams = [
            parts.stream(gradient(), stream_id=at, priority=priority) for at, priority in enumerate((5, -1))
        ]
        streams[0].grant(tiles(0, 1, 2))
        await until(lambda: parts.batcher.tiles_queued == 2)
        streams[1].grant(tiles(0, 2))
        orders = [waiting.order for waiting in parts.batcher._waiting.values()]
        assert orders == [(5, 0), (-1, 0)]
        for stream in (first, *streams):
            await stream.close()

    async def test_do_not_wait_for_a_consumer_that_takes_nothing(self, parts: Bench) -> None:
        idle = parts.stream(gradient())
        idle.grant(tiles(0, *range(13)))
        await asyncio.wait_for(served(parts, tiles(0, *reversed(range(13))), gradient(), stream_id=1), 5)
        await idle.close()

    async def test_that_lead_and_wait_for_each_other_come(self, parts: Bench) -> None:
        """Each leads what the other wants first."""
        forth, back = [*tiles(0, 0), *tiles(1, 0)], [*tiles(1, 0), *tiles(0, 0)]
        pictures = gradient(0), gradient(1)
        for round_number in range(5):
            pair = (
                served(parts, order, *pictures, stream_id=number)
                for number, order in enumerate((forth, back))
            )
            await asyncio.wait_for(asyncio.gather(*pair), 5)
            assert parts.is_idle, round_number

    async def test_of_a_corrupt_picture_fail_each_stream_by_its_own_field(self, parts: Bench) -> None:
        good, bad = gradient(0), corrupt_pixels(gradient(1, format="JPEG"))
        streams = [parts.stream(bad), parts.stream(good, bad, stream_id=1), parts.stream(bad, stream_id=2)]
        for stream, medium in zip(streams, (0, 1, 0), strict=True):
            stream.grant(tiles(medium, 0, 1))
        for stream, medium in zip(streams, (0, 1, 0), strict=True):
            with pytest.raises(InvalidRequest) as caught:
                await asyncio.wait_for(stream.next_tile(), 5)
            assert caught.value.field == f"media[{medium}].data"
        for stream in streams:
            await stream.close()

    async def test_survive_another_picture_of_the_stream_that_leads_them(self) -> None:
        """It fails before it has cut them."""
        maker = Maker()
        async with bench(make_tiles=maker) as parts:
            good, bad = gradient(0), corrupt_pixels(gradient(1, format="JPEG"))
            blocking = parts.stream(gradient(2), stream_id=9)
            blocking.grant(tiles(0, 0))
            await until(lambda: maker.num_waiting == 1)  # on the only thread
            leader = parts.stream(bad, good)
            leader.grant([*tiles(0, 0), *tiles(1, 0, 1)])
            waiter = asyncio.create_task(served(parts, tiles(0, 0, 1), good, stream_id=1))
            await until(lambda: parts.workers.flights.num_joins == 2)
            maker.gate.set()
            with pytest.raises(InvalidRequest):
                await asyncio.wait_for(leader.next_tile(), 5)
            await asyncio.wait_for(waiter, 5)
            await leader.close()
            await blocking.close()
            assert parts.is_idle

    async def test_all_fail_with_the_forward(self, parts: Bench, caplog: pytest.LogCaptureFixture) -> None:
        parts.vision.gate.clear()
        parts.vision.fails = True
        streams = [parts.stream(gradient(), stream_id=number) for number in range(3)]
        for stream in streams:
            stream.grant(tiles(0, 0))
        parts.vision.gate.set()
        for stream in streams:
            with pytest.raises(ModelError):
                await asyncio.wait_for(stream.next_tile(), 5)
            await stream.close()
        assert parts.vision.batches == [1]
        assert [record.name for record in caplog.records] == ["encoder_service.batcher"]

    async def test_all_end_when_the_service_does(self) -> None:
        async with bench() as parts:
            parts.vision.gate.clear()
            streams = [parts.stream(gradient(), stream_id=number) for number in range(3)]
            for stream in streams:
                stream.grant(tiles(0, *range(BATCH_TILES + 2)))
            await until(lambda: parts.batcher.tiles_queued + sum(parts.vision.batches) == BATCH_TILES + 2)
            closing = asyncio.create_task(asyncio.to_thread(parts.batcher.close))
            await until(lambda: parts.batcher.tiles_queued == 0)
            parts.vision.gate.set()
            for stream in streams:
                with pytest.raises(Unavailable):
                    await asyncio.wait_for(take_all(stream), 5)
                await stream.close()
            await closing
            assert parts.is_idle

    async def test_nothing_is_begun_for_a_stream_that_has_closed(self, parts: Bench) -> None:
        stream = parts.stream(gradient())
        await stream.close()
        stream.grant(tiles(0, 0))
        await asyncio.wait_for(served(parts, tiles(0, 0), gradient(), stream_id=1), 5)

    @pytest.mark.parametrize("cache_bytes", [0, 200, 1 << 20])
    async def test_come_to_those_that_stay_however_many_leave(self, cache_bytes: int) -> None:
        dice = random.Random(cache_bytes)
        pictures = [gradient(seed) for seed in range(3)]
        async with bench(budget_bytes=400_000, num_threads=3, cache_bytes=cache_bytes) as parts:

            async def visit(number: int) -> None:
                stream = parts.stream(*pictures, stream_id=number, priority=number % 3)
                order = [
                    GrantedTile(dice.randrange(3), dice.randrange(13)) for _ in range(dice.randint(1, 25))
                ]
                leaves_after = dice.choice((None, None, dice.randrange(len(order) + 1)))
                stream.grant(order)
                stream.end_grants()
                try:
                    if leaves_after is None:
                        assert await take_checked(stream, *pictures) == order
                    else:
                        for expected in order[:leaves_after]:
                            finished = await stream.next_tile()
                            assert finished is not None and finished.granted == expected
                finally:
                    await stream.close()

            for start in range(0, 60, 12):
                visits = (visit(number) for number in range(start, start + 12))
                await asyncio.wait_for(asyncio.gather(*visits), 20)
            assert parts.is_idle

    async def test_of_pictures_behind_a_corrupt_one_are_left_to_others(self, parts: Bench) -> None:
        """More pictures than are decoded at a time: the last one's cut has not begun."""
        bad = corrupt_pixels(gradient(0, format="JPEG"))
        pictures = [bad, *(gradient(seed) for seed in range(1, PICTURES_AHEAD + 1))]
        gate = threading.Event()
        blocked = parts.workers.threads.submit(gate.wait)  # the only one
        leader = parts.stream(*pictures)
        leader.grant([GrantedTile(medium, 0) for medium in range(len(pictures))])
        waiter = asyncio.create_task(served(parts, tiles(0, 0), pictures[-1], stream_id=1))
        await until(lambda: parts.workers.flights.num_joins == 1)
        gate.set()
        await asyncio.wrap_future(blocked)
        with pytest.raises(InvalidRequest):
            await asyncio.wait_for(leader.next_tile(), 5)
        await asyncio.wait_for(waiter, 5)
        await leader.close()

    async def test_are_not_left_to_a_stream_that_has_failed(self) -> None:
        maker = Maker()
        async with bench(num_threads=3, make_tiles=maker) as parts:
            good, bad = gradient(0), corrupt_pixels(gradient(1, format="JPEG"))
            leader, failing = parts.stream(good), parts.stream(bad, good, stream_id=1)
            leader.grant(tiles(0, 0))
            failing.grant([*tiles(0, 0), *tiles(1, 0)])
            waiter = asyncio.create_task(served(parts, tiles(0, 0), good, stream_id=2))
            await until(lambda: parts.workers.flights.num_joins == 2 and maker.num_waiting == 1)
            with pytest.raises(InvalidRequest):
                await asyncio.wait_for(failing.next_tile(), 5)
            closing = asyncio.create_task(leader.close())
            await until(lambda: maker.num_waiting == 2)  # the waiter's turn
            maker.gate.set()
            await asyncio.wait_for(asyncio.gather(closing, waiter), 5)
            await failing.close()
            assert parts.is_idle


class BreakingCutter:
    """Breaks down behind its first tile."""

    def cut(self, tiles: Sequence[int]) -> Iterator[torch.Tensor]:
        yield torch.zeros((3, SIDE, SIDE), dtype=torch.uint8)
        raise RuntimeError("secret of a library")


async def test_what_was_cut_before_a_breakdown_still_comes() -> None:
    async with bench(make_tiles=lambda image, plan: BreakingCutter()) as parts:
        stream = parts.stream(gradient())
        stream.grant(tiles(0, 3, 4))
        finished = await asyncio.wait_for(stream.next_tile(), 5)
        assert finished is not None and finished.granted.tile == 3
        with pytest.raises(RuntimeError):
            await asyncio.wait_for(stream.next_tile(), 5)
        await stream.close()
        assert parts.is_idle
