"""A request's pictures on their way: what is asked of which encoder, and what happens when one is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch

from llm_service.config import EncoderPoolConfig
from llm_service.encoder_pool import EncoderPool
from llm_service.encoding import Encoding, LayoutCache
from llm_service.picture import Picture, PictureLayout, TileId
from protos.encoder_pb2 import TRANSPORT_SHARED_MEMORY
from protos.errors import (
    DeadlineExceeded,
    FingerprintMismatch,
    InvalidRequest,
    ModelError,
    Overloaded,
    ServingError,
    Unavailable,
)
from protos.frames import EncodeEvent
from protos.placement import rendezvous_order
from protos.tensor_pb2 import DTYPE_FLOAT16
from tests.llm_service.scripted_encoder import (
    FINGERPRINT,
    HIDDEN_SIZE,
    TOKENS_PER_TILE,
    EncoderSide,
    FixedBase,
    Script,
    ScriptedEncoder,
    bad_medium,
    beating,
    done,
    encoders,
    hang,
    heartbeat,
    honest,
    in_slots,
    make_picture,
    make_url_picture,
    refuses,
    serve_grants,
    small_ring,
    tile_values,
)
from tests.llm_service.test_encode_stream import assert_ended, assert_no_tasks_but

PICTURES = [make_picture(b"a cat"), make_picture(b"a dog")]
NUM_TILES = 3
SALT = b"salt"
ALL = [TileId(medium, tile) for medium in range(2) for tile in range(NUM_TILES)]


@dataclass
class Request:
    """One encoding, and what came of it."""

    pool: EncoderPool
    layouts: LayoutCache
    cache_salt: bytes = SALT
    pictures: Sequence[Picture] = tuple(PICTURES)
    tiles: list[TileId] = field(default_factory=list)
    values: dict[TileId, torch.Tensor] = field(default_factory=dict)
    errors: list[ServingError] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.encoding = Encoding(
            self.pictures,
            self.pool,
            self.layouts,
            HIDDEN_SIZE,
            (("x-request-id", "r"),),
            self.cache_salt,
            0,
            write=self.write,
            on_tile=self.take,
            on_error=self.fail,
        )

    def write(self, tile: TileId, embeds: torch.Tensor) -> None:
        self.values[tile] = embeds.clone()

    def take(self, tile: TileId) -> None:
        self.tiles.append(tile)
        self.news.set()

    def fail(self, error: ServingError) -> None:
        self.errors.append(error)
        self.news.set()

    async def until(self, condition: Callable[[], bool], seconds: float = 20) -> None:
        async with asyncio.timeout(seconds):
            while not condition():
                self.news.clear()
                await self.news.wait()

    async def arrived(self, count: int) -> None:
        await self.until(lambda: len(self.tiles) >= count or bool(self.errors))
        assert not self.errors, self.errors

    async def failed(self) -> ServingError:
        """The error, which comes exactly once."""
        await self.until(lambda: bool(self.errors))
        await asyncio.sleep(0.05)
        assert len(self.errors) == 1
        return self.errors[0]


@dataclass
class Scene:
    encoders: list[ScriptedEncoder]
    pool: EncoderPool
    layouts: LayoutCache

    def request(self, cache_salt: bytes = SALT, pictures: Sequence[Picture] = tuple(PICTURES)) -> Request:
        request = Request(self.pool, self.layouts, cache_salt, pictures)
        self.requests.append(request)
        return request

    requests: list[Request] = field(default_factory=list)

    def in_order(self) -> list[ScriptedEncoder]:
        """First, second, ... choice for these pictures, by asking the pool."""
        return self._order

    async def find_order(self) -> None:
        self._order: list[ScriptedEncoder] = []
        by_target = {encoder.target: encoder for encoder in self.encoders}
        while len(self._order) < len(self.encoders):
            excluded = [encoder.target for encoder in self._order]
            connection = await self.pool.choose(FINGERPRINT, PICTURES[0].content_hash, 1, excluded)
            self._order.append(by_target[connection.target])


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


def asked(side: EncoderSide) -> list[TileId]:
    """What was granted, in the request's numbers: a stream has its own."""
    names = [picture.data for picture in PICTURES]
    return [TileId(names.index(bytes(side.media[tile.medium])), tile.tile) for tile in side.granted]


def agree(targets: list[str]) -> bool:
    """Both pictures have the same order of preference."""
    first, second = (rendezvous_order(picture.content_hash, targets) for picture in PICTURES)
    return first == second


@asynccontextmanager
async def agreeing(scripted: list[ScriptedEncoder], want: bool = True) -> AsyncIterator[list[str]]:
    """Encoders that listen on ports where the pictures prefer the same of them, or not."""
    while True:
        for encoder in scripted:
            encoder.port = 0
        async with encoders(*scripted) as targets:
            if agree(targets) == want:
                yield targets
                return


@asynccontextmanager
async def scene(
    *scripts: Script, together: bool = True, has_ring: bool = False, **config: Any
) -> AsyncIterator[Scene]:
    """Encoders in the pool's order of preference, which both pictures share unless they are not `together`.

    With `has_ring` they share one.  Afterwards no call, no stream, no load and no task is left.
    """
    before = asyncio.all_tasks()
    rings = ExitStack()
    ring = rings.enter_context(small_ring(has_ring))
    scripted = [ScriptedEncoder(num_tiles=NUM_TILES, ring=ring) for _ in scripts or (honest,)]
    async with agreeing(scripted, together) as targets:
        settings = EncoderPoolConfig(encoders=tuple(targets), **config)
        pool = EncoderPool(settings, FixedBase())  # type: ignore[arg-type]
        it = Scene(scripted, pool, LayoutCache())
        await it.find_order()
        for encoder, script in zip(it.in_order(), scripts, strict=False):
            encoder.script = beating(script)
        try:
            yield it
        finally:
            start = time.monotonic()
            for request in it.requests:
                await request.encoding.close()
                await request.encoding.close()
            for encoder in scripted:
                await assert_ended(encoder)
            assert time.monotonic() - start < 1
            assert [connection.streams_open for connection in pool.connections] == [0] * len(targets)
            assert [connection.load.own for connection in pool.connections] == [0] * len(targets)
            await assert_no_tasks_but(before)
            await pool.close()
            rings.close()


def all_correct(request: Request, tiles: list[TileId] = ALL) -> bool:
    """Every tile once, each with its own values."""
    return sorted(request.tiles, key=ALL.index) == tiles and all(
        torch.equal(values, tile_values(PICTURES[tile.medium].data, tile.tile))
        for tile, values in request.values.items()
    )


class TestTiles:
    async def test_wanted_one_by_one(self) -> None:
        async with scene(initial_credit=0) as it:
            request = it.request()
            assert [layout.num_tokens for layout in await request.encoding.layout()] == [12, 12]
            for count, tile in enumerate(ALL, 1):
                request.encoding.want(tile)
                await request.arrived(count)
            assert all_correct(request)
            assert asked(it.encoders[0].sides[0]) == ALL

    async def test_wanted_all_at_once(self) -> None:
        async with scene(initial_credit=4) as it:
            request = it.request()
            await request.encoding.layout()
            for tile in reversed(ALL):
                request.encoding.want(tile)
            await request.arrived(len(ALL))
            assert all_correct(request)
            assert asked(it.encoders[0].sides[0]) == [TileId(1, 2), TileId(1, 1)]  # the rest is credited

    async def test_credited_tiles_are_kept_until_they_are_wanted(self) -> None:
        async with scene(initial_credit=2) as it:
            request = it.request()
            await request.encoding.layout()
            await until(lambda: len(request.encoding._early) == 2)
            assert request.tiles == []
            request.encoding.want(ALL[1])
            assert request.tiles == [ALL[1]]  # at once: it was here
            request.encoding.want(ALL[0])
            request.encoding.want(ALL[2])
            await request.arrived(3)
            assert asked(it.encoders[0].sides[0]) == [ALL[2]]

    async def test_a_tile_can_be_wanted_again(self) -> None:
        """The engine's store had to drop it."""
        async with scene(initial_credit=0) as it:
            request = it.request()
            await request.encoding.layout()
            for count in (1, 2):
                request.encoding.want(ALL[0])
                await request.arrived(count)
            assert request.tiles == [ALL[0]] * 2

    async def test_after_finish_the_encoder_forgets_the_pictures(self) -> None:
        async with scene(initial_credit=1) as it:
            request = it.request()
            await request.encoding.layout()
            request.encoding.want(ALL[0])
            await request.arrived(1)
            request.encoding.finish()
            await assert_ended(it.encoders[0])
            assert it.encoders[0].sides[0].is_half_closed
            await until(lambda: it.pool.connections[0].streams_open == 0)

    async def test_finish_waits_for_what_is_wanted(self) -> None:
        async with scene(initial_credit=0) as it:
            request = it.request()
            await request.encoding.layout()
            request.encoding.want(ALL[0])
            request.encoding.finish()
            await request.arrived(1)
            assert not it.encoders[0].sides[0].is_half_closed

    @pytest.mark.parametrize("pause_s", [0, 0.1])
    async def test_wanting_after_finish_opens_the_pictures_again(self, pause_s: float) -> None:
        async with scene(initial_credit=0) as it:
            request = it.request()
            await request.encoding.layout()
            request.encoding.want(ALL[0])
            await request.arrived(1)
            request.encoding.finish()
            await asyncio.sleep(pause_s)
            request.encoding.want(ALL[4])
            request.encoding.want(ALL[5])
            await request.arrived(3)
            assert all_correct(request, [ALL[0], ALL[4], ALL[5]])
            assert [asked(side) for side in it.encoders[0].sides] == [[ALL[0]], [ALL[4], ALL[5]]]

    async def test_early_tiles_that_nobody_wanted_are_not_kept_after_finish(self) -> None:
        async def late_credit(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
            await side.read_pictures()
            yield side.layout()
            yield side.tile(ALL[0])
            assert await side.next_grant() is None
            yield side.tile(ALL[1])
            yield done()

        async with scene(late_credit, initial_credit=2) as it:
            request = it.request()
            await request.encoding.layout()
            await until(lambda: len(request.encoding._early) == 1)
            request.encoding.finish()
            await assert_ended(it.encoders[0])
            await until(lambda: not request.encoding._parts)
            assert request.encoding._early == {} and request.tiles == []


class TestKnownPictures:
    async def test_open_no_stream_until_a_tile_is_wanted(self) -> None:
        async with scene(initial_credit=2) as it:
            first = it.request()
            await first.encoding.layout()
            await first.encoding.close()
            second = it.request()
            assert await second.encoding.layout() == [PictureLayout((TOKENS_PER_TILE,) * NUM_TILES)] * 2
            await asyncio.sleep(0.05)
            assert len(it.encoders[0].sides) == 1
            for tile in ALL[2:4]:
                second.encoding.want(tile)
            await second.arrived(2)
            assert all_correct(second, ALL[2:4])
            side = it.encoders[0].sides[1]
            assert side.opening.initial_credit == 0 and asked(side) == ALL[2:4]

    async def test_tiles_that_are_wanted_later_are_their_encoders_load_too(self) -> None:
        async def silent(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
            await side.read_pictures()
            yield side.layout()
            await hang()

        async with scene(silent) as it:
            for picture in PICTURES:
                it.layouts.put(SALT, picture.content_hash, PictureLayout((TOKENS_PER_TILE,) * NUM_TILES))
            request = it.request()
            await request.encoding.layout()
            request.encoding.want(ALL[0])
            load = it.pool.connections[0].load
            await until(lambda: 0 in request.encoding._part_of)
            assert load.own == 1
            request.encoding.want(ALL[1])
            request.encoding.want(ALL[2])
            assert load.own == 3

    async def test_another_cache_salt_does_not_know_them(self) -> None:
        async with scene(initial_credit=2) as it:
            await it.request(b"tenant").encoding.layout()
            await it.request(b"another").encoding.layout()
            assert len(it.encoders[0].sides) == 2

    async def test_of_which_only_some_are_known_get_no_credit_and_the_known_are_not_sent(self) -> None:
        async with scene(initial_credit=2) as it:
            it.layouts.put(SALT, PICTURES[0].content_hash, PictureLayout((TOKENS_PER_TILE,) * NUM_TILES))
            request = it.request()
            assert len(await request.encoding.layout()) == 2
            [side] = it.encoders[0].sides
            assert side.opening.initial_credit == 0 and side.media == [PICTURES[1].data]
            for tile in ALL:
                request.encoding.want(tile)
            await request.arrived(len(ALL))
            assert all_correct(request)
            assert [asked(side) for side in it.encoders[0].sides] == [ALL[NUM_TILES:], ALL[:NUM_TILES]]

    async def test_an_encoder_that_lays_them_out_differently_is_not_believed(self) -> None:
        """The prompt has been made for the remembered lengths."""
        async with scene() as it:
            for picture in PICTURES:
                it.layouts.put(
                    SALT, picture.content_hash, PictureLayout((TOKENS_PER_TILE,) * (NUM_TILES + 1))
                )
            request = it.request()
            await request.encoding.layout()
            request.encoding.want(ALL[0])
            assert type(await request.failed()) is Unavailable
            assert request.tiles == []

    async def test_a_layout_that_was_contradicted_is_not_remembered_any_longer(self) -> None:
        """An encoder of another version may take other frames of a video: one request fails, not all."""
        async with scene() as it:
            stale, new = (PictureLayout((TOKENS_PER_TILE,) * count) for count in (NUM_TILES + 1, NUM_TILES))
            for picture in PICTURES:
                it.layouts.put(SALT, picture.content_hash, stale)
            failing = it.request()
            assert await failing.encoding.layout() == [stale, stale]
            failing.encoding.want(ALL[0])
            failing.encoding.want(ALL[NUM_TILES])
            await failing.failed()
            request = it.request()
            assert await request.encoding.layout() == [new, new]

    def test_the_least_recently_used_is_forgotten(self) -> None:
        cache = LayoutCache(max_entries=2)
        layouts = [PictureLayout((number,)) for number in range(3)]
        cache.put(SALT, b"0", layouts[0])
        cache.put(SALT, b"1", layouts[1])
        assert cache.get(SALT, b"0") == layouts[0]
        cache.put(SALT, b"2", layouts[2])
        assert [cache.get(SALT, key) for key in (b"0", b"1", b"2")] == [layouts[0], None, layouts[2]]


def dies_after(count: int) -> Script:
    """Serves `count` tiles and breaks off."""

    async def script(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
        await side.read_pictures()
        yield side.layout()
        served = 0
        async for event in serve_grants(side, side.credited()):
            if served == count:
                raise Unavailable("going down")
            served += 1
            yield event

    return script


async def stops_after_two(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
    """Ends with OK while tiles are missing."""
    await side.read_pictures()
    yield side.layout()
    for tile in ALL[:2]:
        yield side.tile(tile)


async def says_done_after_two(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
    async for event in stops_after_two(side):
        yield event
    yield done()
    await hang()


async def sends_the_second_twice(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
    async for event in stops_after_two(side):
        yield event
    yield side.tile(ALL[1])
    await hang()


class TestFailover:
    @pytest.mark.parametrize(
        ("script", "num_served"),
        [
            (dies_after(0), 0),
            (dies_after(1), 1),
            (dies_after(5), 5),
            (stops_after_two, 2),
            (says_done_after_two, 2),
            (sends_the_second_twice, 2),
        ],
        ids=["no tile", "one tile", "all but one", "ends with OK", "early done", "tile twice"],
    )
    async def test_only_the_missing_tiles_are_asked_of_the_next_encoder(
        self, script: Script, num_served: int
    ) -> None:
        async with scene(script, honest, initial_credit=4) as it:
            request = it.request()
            await request.encoding.layout()
            for tile in ALL:
                request.encoding.want(tile)
            await request.arrived(len(ALL))
            assert all_correct(request) and request.errors == []
            [side] = it.in_order()[1].sides
            assert asked(side) == ALL[num_served:] and side.opening.initial_credit == 0

    async def test_a_silent_encoder_is_replaced_within_a_second(self) -> None:
        async def mute(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
            await side.read_pictures()
            yield side.layout()
            yield side.tile(ALL[0])
            await hang()

        async with scene(honest, honest, initial_credit=0) as it:
            it.in_order()[0].script = mute
            request = it.request()
            await request.encoding.layout()
            start = time.monotonic()
            request.encoding.want(ALL[1])
            await request.arrived(1)
            assert time.monotonic() - start < 1.2
            assert asked(it.in_order()[1].sides[0]) == [ALL[1]]

    @pytest.mark.parametrize(
        "error",
        [Unavailable("shutting down"), FingerprintMismatch("another checkpoint")],
        ids=["unavailable", "fingerprint"],
    )
    async def test_an_encoder_that_refuses_to_begin_is_passed_over(self, error: ServingError) -> None:
        async with scene(refuses(error), honest) as it:
            request = it.request()
            assert len(await request.encoding.layout()) == 2
            assert len(it.in_order()[1].sides) == 1

    async def test_a_full_encoder_is_passed_over_and_stays_in_the_pool(self) -> None:
        async with scene(refuses(Overloaded("full", retry_after_s=3.0)), honest) as it:
            request = it.request()
            await request.encoding.layout()
            assert len(it.in_order()[1].sides) == 1 and it.pool.num_ready == 2

    @pytest.mark.parametrize("when", ["at first", "at a tile"])
    async def test_one_whose_tower_fails_is_passed_over_and_stays_in_the_pool(self, when: str) -> None:
        async def fails(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
            await side.read_pictures()
            if when == "at a tile":
                yield side.layout()
                await side.next_grant()
            raise ModelError("out of memory")

        async with scene(fails, honest, initial_credit=0) as it:
            request = it.request()
            await request.encoding.layout()
            for tile in ALL:
                request.encoding.want(tile)
            await request.arrived(len(ALL))
            assert all_correct(request) and it.pool.num_ready == 2

    async def test_one_that_sends_another_type_than_it_announced_is_passed_over(self) -> None:
        async def lies(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
            await side.read_pictures()
            yield side.layout(dtype=DTYPE_FLOAT16)
            await hang()

        async with scene(lies, honest) as it:
            await it.request().encoding.layout()
            assert len(it.in_order()[1].sides) == 1

    async def test_when_all_are_full_the_request_is_told_so(self) -> None:
        async with scene(*[refuses(Overloaded("full", retry_after_s=3.0))] * 2) as it:
            with pytest.raises(Overloaded) as raised:
                await it.request().encoding.layout()
            assert raised.value.retry_after_s == 3.0
            assert [len(encoder.sides) for encoder in it.encoders] == [1, 1]

    async def test_a_layout_that_does_not_come_is_asked_of_the_next(self) -> None:
        async def stuck(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
            await hang()
            yield heartbeat()

        async with scene(stuck, honest, layout_timeout_s=0.3) as it:
            request = it.request()
            start = time.monotonic()
            await request.encoding.layout()
            assert time.monotonic() - start < 1

    async def test_a_bad_picture_is_not_tried_elsewhere(self) -> None:
        async with scene(refuses(bad_medium(1)), honest) as it:
            with pytest.raises(InvalidRequest) as raised:
                await it.request().encoding.layout()
            assert raised.value.field == "media[1].data"
            assert it.in_order()[1].sides == []
            assert it.pool.num_ready == 2

    async def test_when_all_are_gone_the_request_fails_once(self) -> None:
        async with scene(dies_after(1), dies_after(1), initial_credit=0) as it:
            request = it.request()
            await request.encoding.layout()
            for tile in ALL:
                request.encoding.want(tile)
            error = await request.failed()
            assert type(error) is Unavailable and "encoder" in error.message
            assert request.tiles == ALL[:2]

    async def test_when_all_refuse_to_begin_the_request_fails(self) -> None:
        async with scene(refuses(Unavailable("a")), refuses(Unavailable("b"))) as it:
            with pytest.raises(Unavailable, match="encoder"):
                await it.request().encoding.layout()

    async def test_with_a_known_picture_the_request_fails_once_too(self) -> None:
        async with scene(refuses(Unavailable("a"))) as it:
            for picture in PICTURES:
                it.layouts.put(SALT, picture.content_hash, PictureLayout((TOKENS_PER_TILE,) * NUM_TILES))
            request = it.request()
            await request.encoding.layout()
            for tile in ALL:
                request.encoding.want(tile)
            assert type(await request.failed()) is Unavailable

    async def test_a_slow_tile_is_a_deadline_and_not_tried_elsewhere(self) -> None:
        async def stuck(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
            await side.read_pictures()
            yield side.layout()
            await hang()

        async with scene(stuck, honest, tile_timeout_s=0.3) as it:
            request = it.request()
            await request.encoding.layout()
            request.encoding.want(ALL[0])
            assert type(await request.failed()) is DeadlineExceeded
            assert it.in_order()[1].sides == []

    async def test_a_stream_that_broke_while_nothing_was_wanted_is_opened_again(self) -> None:
        """Also at the encoder it broke at: it may have been restarted."""
        async with scene(dies_after(0), initial_credit=1) as it:
            request = it.request()
            await request.encoding.layout()
            await assert_ended(it.encoders[0])
            await asyncio.sleep(0.05)
            it.encoders[0].script = beating(honest)
            request.encoding.want(ALL[0])
            request.encoding.want(ALL[1])
            await request.arrived(2)
            assert all_correct(request, ALL[:2])

    @pytest.mark.parametrize("granted_first", [0, 1], ids=["while nothing is wanted", "as a tile is wanted"])
    async def test_a_stream_that_the_encoder_found_idle_is_opened_again(self, granted_first: int) -> None:
        """Requests that wait in the queue ask for nothing for minutes."""

        async def idle(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
            await side.read_pictures()
            yield side.layout()
            for _ in range(granted_first):
                await side.next_grant()
            it.encoders[0].script = beating(honest)
            raise DeadlineExceeded("the stream is idle", field="grant")

        async with scene(idle, initial_credit=0) as it:
            request = it.request()
            await request.encoding.layout()
            if not granted_first:
                await assert_ended(it.encoders[0])
                await asyncio.sleep(0.05)
            request.encoding.want(ALL[0])
            request.encoding.want(ALL[1])
            await request.arrived(2)
            assert all_correct(request, ALL[:2]) and not request.errors

    async def test_a_bug_of_ours_ends_the_request(self) -> None:
        def broken(tile: TileId, embeds: torch.Tensor) -> None:
            raise IndexError(tile)

        async with scene(initial_credit=0) as it:
            request = it.request()
            request.encoding._write = broken
            await request.encoding.layout()
            request.encoding.want(ALL[0])
            assert type(await request.failed()) is ModelError


async def waits_for(event: asyncio.Event, side: EncoderSide) -> AsyncIterator[EncodeEvent]:
    """Lays out; serves tiles once the event is set."""
    await side.read_pictures()
    yield side.layout()
    await event.wait()
    async for served in serve_grants(side, side.credited()):
        yield served


class TestOverwrittenTiles:
    """The encoder has ended the stream, and says so behind the tiles that it sent before."""

    async def test_one_that_is_wanted_is_asked_of_the_next_encoder(self) -> None:
        async def hasty(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
            await side.read_pictures()
            yield side.layout(transport=TRANSPORT_SHARED_MEMORY)
            await side.next_grant()
            yield one_overwritten(side)
            raise Unavailable("going down")

        async with scene(hasty, honest, has_ring=True, initial_credit=0) as it:
            await all_attached(it)
            request = it.request()
            await request.encoding.layout()
            request.encoding.want(ALL[0])
            request.encoding.want(ALL[1])
            await request.arrived(2)
            assert request.tiles == [ALL[1], ALL[0]] and all_correct(request, ALL[:2])
            assert asked(it.in_order()[1].sides[0]) == [ALL[0]]

    async def test_one_that_is_not_wanted_yet_is_not_kept(self) -> None:
        may_end = asyncio.Event()

        async def hasty(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
            await side.read_pictures()
            yield side.layout(transport=TRANSPORT_SHARED_MEMORY)
            yield one_overwritten(side)
            await may_end.wait()
            raise Unavailable("going down")

        async with scene(hasty, honest, has_ring=True, initial_credit=2) as it:
            await all_attached(it)
            request = it.request()
            await request.encoding.layout()
            await until(lambda: bool(request.encoding._early))
            assert list(request.encoding._early) == [ALL[1]]
            request.encoding.want(ALL[0])
            request.encoding.want(ALL[1])
            assert request.tiles == [ALL[1]]
            may_end.set()
            await request.arrived(2)
            assert all_correct(request, ALL[:2])
            assert asked(it.in_order()[1].sides[0]) == [ALL[0]]


def one_overwritten(side: EncoderSide) -> EncodeEvent:
    """Of the first two tiles the first."""
    tiles = [side.tile_in_slot(tile, slot) for slot, tile in enumerate(ALL[:2])]
    side.overwrite(0, b"another tile")
    return in_slots(*tiles)


async def all_attached(it: Scene) -> None:
    await until(lambda: all(connection.ring is not None for connection in it.pool.connections))


class TestSeveralEncoders:
    """The first picture prefers the first encoder, the second picture the second."""

    async def test_each_picture_goes_where_its_content_belongs(self) -> None:
        async with scene(honest, honest, together=False, initial_credit=0) as it:
            first, second = it.in_order()
            first.num_tiles = 2
            request = it.request()
            layouts = await request.encoding.layout()
            assert [len(layout.tokens_per_tile) for layout in layouts] == [2, NUM_TILES]  # in prompt order
            wanted = ALL[:2] + ALL[NUM_TILES:]
            for tile in wanted:
                request.encoding.want(tile)
            await request.arrived(len(wanted))
            assert all_correct(request, wanted)
            assert [asked(side) for side in first.sides] == [ALL[:2]]
            assert [asked(side) for side in second.sides] == [ALL[NUM_TILES:]]

    async def test_they_work_side_by_side(self) -> None:
        """Each encoder waits until the other has begun."""
        begun = [asyncio.Event(), asyncio.Event()]

        def meets(own: int) -> Script:
            async def script(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
                begun[own].set()
                await begun[1 - own].wait()
                async for event in honest(side):
                    yield event

            return script

        async with scene(meets(0), meets(1), together=False) as it:
            request = it.request()
            await request.encoding.layout()
            for tile in ALL:
                request.encoding.want(tile)
            await request.arrived(len(ALL))
            assert all_correct(request)

    async def test_the_initial_credit_is_divided(self) -> None:
        async with scene(honest, honest, together=False, initial_credit=3) as it:
            request = it.request()
            await request.encoding.layout()
            assert [encoder.sides[0].opening.initial_credit for encoder in it.in_order()] == [2, 1]
            await until(lambda: len(request.encoding._early) == 3)
            for tile in (ALL[0], ALL[1], ALL[3]):
                request.encoding.want(tile)
            assert all_correct(request, [ALL[0], ALL[1], ALL[3]])

    @pytest.mark.parametrize("lost", [0, 1])
    async def test_one_that_dies_is_replaced_and_the_other_does_not_notice(self, lost: int) -> None:
        async with scene(honest, honest, together=False, initial_credit=0) as it:
            dying, other = it.in_order()[lost], it.in_order()[1 - lost]
            dying.script = beating(dies_after(1))
            request = it.request()
            await request.encoding.layout()
            for tile in ALL:
                request.encoding.want(tile)
            await request.arrived(len(ALL))
            assert all_correct(request) and request.errors == []
            of_lost = ALL[lost * NUM_TILES : (lost + 1) * NUM_TILES]
            own, taken_over = other.sides
            assert asked(taken_over) == of_lost[1:] and taken_over.media == [PICTURES[lost].data]
            assert asked(own) == [tile for tile in ALL if tile not in of_lost] and not own.ended.is_set()

    async def test_a_silent_one_is_replaced_within_a_second(self) -> None:
        async def mute(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
            await side.read_pictures()
            yield side.layout()
            await hang()

        async with scene(honest, honest, together=False, initial_credit=0) as it:
            it.in_order()[0].script = mute
            request = it.request()
            await request.encoding.layout()
            start = time.monotonic()
            for tile in ALL:
                request.encoding.want(tile)
            await request.arrived(NUM_TILES)
            assert all_correct(request, ALL[NUM_TILES:])  # those of the other came meanwhile
            await request.arrived(len(ALL))
            assert time.monotonic() - start < 1.2 and all_correct(request)

    async def test_only_pictures_with_missing_tiles_are_sent_again(self) -> None:
        """Both were at one encoder; the first is complete when it dies."""
        async with scene(dies_after(NUM_TILES), honest, initial_credit=0) as it:
            request = it.request()
            await request.encoding.layout()
            for tile in ALL:
                request.encoding.want(tile)
            await request.arrived(len(ALL))
            [side] = it.in_order()[1].sides
            assert all_correct(request) and side.media == [PICTURES[1].data]

    async def test_a_bad_picture_is_named_by_its_place_in_the_request(self) -> None:
        async with scene(honest, refuses(bad_medium(0)), together=False) as it:
            with pytest.raises(InvalidRequest) as raised:
                await it.request().encoding.layout()
            assert raised.value.field == "media[1].data" and it.pool.num_ready == 2

    async def test_a_picture_that_is_bad_when_it_is_decoded_is_named_too(self) -> None:
        async def late(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
            await side.read_pictures()
            yield side.layout()
            await side.next_grant()
            raise bad_medium(0)

        async with scene(honest, late, together=False, initial_credit=0) as it:
            request = it.request()
            await request.encoding.layout()
            request.encoding.want(ALL[NUM_TILES])
            error = await request.failed()
            assert type(error) is InvalidRequest and error.field == "media[1].data"

    async def test_when_all_are_gone_the_request_fails_once(self) -> None:
        async with scene(dies_after(1), dies_after(1), together=False, initial_credit=0) as it:
            request = it.request()
            await request.encoding.layout()
            for tile in ALL:
                request.encoding.want(tile)
            error = await request.failed()
            assert type(error) is Unavailable and "encoder" in error.message

    async def test_a_busy_one_is_passed_over(self) -> None:
        async with scene(honest, honest, initial_credit=0) as it:
            busy = next(c for c in it.pool.connections if c.target == it.in_order()[0].target)
            busy.load.own += 1000
            request = it.request()
            await request.encoding.layout()
            assert [len(encoder.sides) for encoder in it.in_order()] == [0, 1]
            busy.load.own -= 1000

    async def test_tiles_count_as_load_until_they_are_here(self) -> None:
        go = asyncio.Event()

        script = partial(waits_for, go)
        async with scene(script, script, together=False, initial_credit=0) as it:
            loads = {connection.target: connection.load for connection in it.pool.connections}
            load = loads[it.in_order()[0].target]
            request = it.request()
            await request.encoding.layout()
            for tile in ALL:
                request.encoding.want(tile)
            assert load.own == NUM_TILES
            go.set()
            await request.arrived(len(ALL))
            assert load.own == 0

    async def test_finish_ends_all_streams(self) -> None:
        async with scene(honest, honest, together=False, initial_credit=0) as it:
            request = it.request()
            await request.encoding.layout()
            for tile in ALL:
                request.encoding.want(tile)
            await request.arrived(len(ALL))
            request.encoding.finish()
            for encoder in it.encoders:
                await assert_ended(encoder)
                assert encoder.sides[0].is_half_closed


class TestClose:
    """`scene` closes every request and asserts that nothing is left, within a second."""

    async def test_while_the_layout_is_awaited(self) -> None:
        async def stuck(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
            await side.read_pictures()
            await hang()
            yield heartbeat()

        async with scene(stuck) as it:
            laying_out = asyncio.create_task(it.request().encoding.layout())
            await asyncio.sleep(0.1)
            laying_out.cancel()
            await asyncio.wait([laying_out])
            assert laying_out.cancelled()

    async def test_before_anything_began(self) -> None:
        async with scene() as it:
            it.request()

    async def test_between_tiles(self) -> None:
        async with scene(initial_credit=0) as it:
            request = it.request()
            await request.encoding.layout()
            for tile in ALL:
                request.encoding.want(tile)
            await request.until(lambda: len(request.tiles) > 0)
            await request.encoding.close()
            count = len(request.tiles)
            await asyncio.sleep(0.1)
            assert len(request.tiles) == count

    async def test_while_it_opens_the_pictures_again(self) -> None:
        async def stuck(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
            await side.read_pictures()
            await hang()
            yield heartbeat()

        async with scene(dies_after(0), stuck) as it:
            request = it.request()
            await request.encoding.layout()
            request.encoding.want(ALL[0])
            await asyncio.sleep(0.2)
            assert len(it.in_order()[1].sides) == 1
            await request.encoding.close()
            assert request.errors == []

    async def test_after_an_error(self) -> None:
        async with scene(dies_after(0), initial_credit=0) as it:
            request = it.request()
            await request.encoding.layout()
            request.encoding.want(ALL[0])
            await request.failed()

    async def test_cancelled_while_it_waits_has_closed_the_stream_already(self) -> None:
        async with scene(initial_credit=0) as it:
            request = it.request()
            await request.encoding.layout()
            closing = asyncio.create_task(request.encoding.close())
            await asyncio.sleep(0)
            closing.cancel()
            await asyncio.wait([closing])
            assert it.pool.connections[0].streams_open == 0


URL = "https://example.org/cat.png"


class TestUrls:
    async def test_what_is_there_is_named_by_the_layout_and_never_remembered(self) -> None:
        async with scene(initial_credit=0) as it:
            for data in (b"a cat", b"another cat"):
                it.encoders[0].web = {URL: data}
                request = it.request(pictures=[make_url_picture(URL)])
                [layout] = await request.encoding.layout()
                assert layout.fetched_hash == make_picture(data).content_hash
                request.encoding.want(ALL[0])
                await request.arrived(1)
                assert torch.equal(request.values[ALL[0]], tile_values(data, 0))

    async def test_it_is_fetched_again_where_the_stream_broke(self) -> None:
        async with scene(dies_after(0), initial_credit=1) as it:
            request = await self._broken(it, b"a cat")
            request.encoding.want(ALL[1])
            await request.arrived(1)
            assert torch.equal(request.values[ALL[1]], tile_values(b"a cat", 1))

    async def test_other_bytes_than_before_are_an_error(self) -> None:
        async with scene(dies_after(0), initial_credit=1) as it:
            request = await self._broken(it, b"another cat")
            request.encoding.want(ALL[1])
            error = await request.failed()
            assert isinstance(error, InvalidRequest) and error.field == "media[0].url"
            assert not request.tiles

    async def _broken(self, it: Scene, data: bytes) -> Request:
        """A request whose encoder was lost, and what is at its URL since then."""
        it.encoders[0].web = {URL: b"a cat"}
        request = it.request(pictures=[make_url_picture(URL)])
        await request.encoding.layout()
        await assert_ended(it.encoders[0])
        await asyncio.sleep(0.05)
        it.encoders[0].script = beating(honest)
        it.encoders[0].web = {URL: data}
        return request

    async def test_a_layout_without_a_hash_is_not_believed(self) -> None:
        async def nameless(side: EncoderSide) -> AsyncIterator[EncodeEvent]:
            await side.read_pictures()
            event = side.layout()
            event.layout.media[0].content_hash = b""
            yield event

        async with scene(nameless) as it:
            it.encoders[0].web = {URL: b"a cat"}
            request = it.request(pictures=[make_url_picture(URL)])
            with pytest.raises(Unavailable):
                await request.encoding.layout()
