from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest
import torch

from encoder_service.batcher import EncodedTile, OrderKey
from encoder_service.tile_cache import TileCache, TileKey
from encoder_service.tile_flights import Claim, TileFlights
from protos.errors import InvalidRequest, ModelError, Unavailable

KEY: TileKey = (b"salt", b"a picture", 3)
PIXELS = torch.zeros((3, 2, 2), dtype=torch.uint8)
EMBEDS = torch.ones((2, 3))
TILE = EncodedTile(EMBEDS, queue_ns=1, encode_ns=2, transfer_ns=3, on_device=EMBEDS.clone())


class ScriptedBatcher:
    """Forwards end when the test says so."""

    def __init__(self) -> None:
        self.forwards: list[asyncio.Future[EncodedTile]] = []
        self.orders: list[OrderKey] = []
        self.is_closed = False

    def submit(self, tile: torch.Tensor, order: OrderKey) -> asyncio.Future[EncodedTile]:
        if self.is_closed:
            raise Unavailable("the encoder is shutting down")
        self.forwards.append(asyncio.get_running_loop().create_future())
        self.orders.append(order)
        return self.forwards[-1]

    def hasten(self, future: asyncio.Future[EncodedTile], order: OrderKey) -> None:
        place = self.forwards.index(future)
        self.orders[place] = min(self.orders[place], order)


class Streams:
    """Claims of many streams, and which of them were asked to lead, in order."""

    def __init__(self, cache: TileCache) -> None:
        self.batcher = ScriptedBatcher()
        self.flights = TileFlights(self.batcher, cache)
        self.leaders: list[Claim] = []
        self.asked = asyncio.Event()  # one of them

    def claim(self, key: TileKey = KEY, priority: int = 0) -> Claim:
        return self.flights.claim(key, (priority, key[2]), self._lead)

    def _lead(self, claim: Claim) -> None:
        self.leaders.append(claim)
        self.asked.set()


@pytest.fixture
async def streams() -> AsyncIterator[Streams]:
    cache = TileCache(1 << 20)
    yield Streams(cache)
    cache.close()


async def turn() -> None:
    """Let callbacks run that are due."""
    for _ in range(3):
        await asyncio.sleep(0)


async def test_all_get_the_result_of_the_one_that_came_first(streams: Streams) -> None:
    before = [streams.claim() for _ in range(2)]
    assert streams.leaders == before[:1]
    streams.flights.submit(before[0], PIXELS)
    claims = [*before, streams.claim()]
    assert len(streams.batcher.forwards) == 1 and streams.leaders == before[:1]
    assert not any(claim.result.done() for claim in claims)
    streams.batcher.forwards[0].set_result(TILE)
    await turn()
    for claim in claims:
        assert claim.result.result().embeds is EMBEDS
        assert claim.result.result().encode_ns == 2
        assert claim.result.result().on_device is None  # which only the cache may hold
    assert streams.flights.num_joins == 2


async def test_the_next_one_is_served_by_the_cache_at_once_and_for_nothing(streams: Streams) -> None:
    first = streams.claim()
    streams.flights.submit(first, PIXELS)
    streams.batcher.forwards[0].set_result(TILE)
    await turn()
    later = streams.claim()
    assert later.result.result() == EncodedTile(EMBEDS, 0, 0, 0)
    assert streams.leaders == [first] and streams.flights.num_joins == 0


@pytest.mark.parametrize(
    "other", [(b"", b"a picture", 3), (b"salt", b"another", 3), (b"salt", b"a picture", 4)]
)
async def test_another_salt_picture_or_number_flies_alone(streams: Streams, other: TileKey) -> None:
    claims = [streams.claim(), streams.claim(other)]
    assert streams.leaders == claims
    streams.flights.submit(claims[0], PIXELS)
    streams.batcher.forwards[0].set_result(TILE)
    await turn()
    assert claims[0].result.done() and not claims[1].result.done()


async def test_a_leader_that_leaves_is_followed_by_the_oldest_that_waits(streams: Streams) -> None:
    claims = [streams.claim() for _ in range(4)]
    streams.flights.leave(claims[1])
    streams.flights.leave(claims[0])
    assert streams.leaders == [claims[0], claims[2]]
    streams.flights.submit(claims[2], PIXELS)
    streams.flights.leave(claims[2])
    assert streams.leaders == [claims[0], claims[2]]  # its forward goes on for the last one
    streams.batcher.forwards[0].set_result(TILE)
    await turn()
    assert claims[3].result.result().embeds is EMBEDS
    assert all(claim.result.cancelled() for claim in claims[:3])


async def test_a_leader_whose_picture_fails_keeps_its_error_to_itself(streams: Streams) -> None:
    claims = [streams.claim() for _ in range(3)]
    error = InvalidRequest("corrupt", field="media[7].data")
    streams.flights.fail(claims[0], error)
    assert claims[0].result.exception() is error
    assert streams.leaders == claims[:2] and not claims[1].result.done()
    streams.flights.submit(claims[1], PIXELS)
    streams.batcher.forwards[0].set_result(TILE)
    await turn()
    assert claims[2].result.result().embeds is EMBEDS


async def test_an_error_of_the_tower_reaches_all_each_with_its_own(streams: Streams) -> None:
    claims = [streams.claim() for _ in range(3)]
    streams.flights.submit(claims[0], PIXELS)
    streams.batcher.forwards[0].set_exception(ModelError("the vision tower failed on this tile"))
    await turn()
    errors = [claim.result.exception() for claim in claims]
    assert [type(error) for error in errors] == [ModelError] * 3 and len({id(error) for error in errors}) == 3
    assert errors[2].message == "the vision tower failed on this tile"
    again = streams.claim()  # nothing is remembered of it
    assert streams.leaders == [claims[0], again]


async def test_a_closed_batcher_ends_all(streams: Streams) -> None:
    claims = [streams.claim() for _ in range(3)]
    streams.batcher.is_closed = True
    streams.flights.submit(claims[0], PIXELS)
    assert [type(claim.result.exception()) for claim in claims] == [Unavailable] * 3


async def test_when_the_last_one_leaves_the_forward_is_cancelled(streams: Streams) -> None:
    claims = [streams.claim() for _ in range(2)]
    streams.flights.submit(claims[0], PIXELS)
    streams.flights.leave(claims[0])
    assert not streams.batcher.forwards[0].cancelled()
    streams.flights.leave(claims[1])
    assert streams.batcher.forwards[0].cancelled()
    assert streams.claim() is streams.leaders[-1]


async def test_all_may_leave_between_a_forwards_end_and_the_news_of_it(streams: Streams) -> None:
    problems: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, problem: problems.append(problem))
    first = streams.claim()
    streams.flights.submit(first, PIXELS)
    streams.batcher.forwards[0].set_result(TILE)
    streams.flights.leave(first)
    second = streams.claim()
    await turn()
    assert problems == [] and streams.leaders == [first, second] and not second.result.done()
    assert streams.claim(priority=1).result.done() is False  # it waits for the second
    streams.flights.leave(second)
    streams.flights.leave(streams.leaders[-1])
    assert streams.claim().result.result().embeds is EMBEDS  # the cache has it


async def test_a_tile_has_the_best_priority_of_those_that_want_it(streams: Streams) -> None:
    first = streams.claim(priority=5)
    streams.claim(priority=2)
    streams.flights.submit(first, PIXELS)
    assert streams.batcher.orders == [(2, 3)]
    streams.claim(priority=4)
    assert streams.batcher.orders == [(2, 3)]
    streams.claim(priority=-1)
    assert streams.batcher.orders == [(-1, 3)]


async def test_who_leads_and_who_still_may(streams: Streams) -> None:
    claims = [streams.claim() for _ in range(2)]
    assert [(claim.leads, claim.may_lead) for claim in claims] == [(True, False), (False, True)]
    streams.flights.submit(claims[0], PIXELS)
    assert [(claim.leads, claim.may_lead) for claim in claims] == [(False, False)] * 2
    streams.batcher.forwards[0].set_result(TILE)
    await turn()
    assert [(claim.leads, claim.may_lead) for claim in claims] == [(False, False)] * 2


class TestFromADevice:
    """A tile that the cache holds on the device must be copied first."""

    @pytest.fixture
    async def copying(self) -> AsyncIterator[CopyingStreams]:
        made = CopyingStreams()
        yield made
        made.gate.set()
        await asyncio.to_thread(made.cache.close)

    async def test_one_copy_serves_all_that_want_the_tile_meanwhile(self, copying: CopyingStreams) -> None:
        claims = [copying.streams.claim() for _ in range(3)]
        assert [claim.may_lead for claim in claims] == [True] * 3
        assert copying.streams.leaders == []
        copying.gate.set()
        tiles = [await claim.result for claim in claims]
        assert copying.num_copies == 1 and copying.streams.leaders == []
        assert all(torch.equal(tile.embeds, EMBEDS) and tile.encode_ns == 0 for tile in tiles)

    async def test_a_copy_that_fails_is_replaced_by_a_forward(
        self, copying: CopyingStreams, caplog: pytest.LogCaptureFixture
    ) -> None:
        streams = copying.streams
        claims = [streams.claim() for _ in range(3)]
        streams.flights.leave(claims[0])
        copying.fails = True
        copying.gate.set()
        await asyncio.wait_for(copying.streams.asked.wait(), 10)
        assert streams.leaders == [claims[1]]
        streams.flights.submit(claims[1], PIXELS)
        streams.batcher.forwards[0].set_result(TILE)
        assert torch.equal((await claims[2].result).embeds, EMBEDS)
        assert [record.name for record in caplog.records] == ["encoder_service.tile_cache"]

    async def test_all_may_leave_while_it_is_copied(self, copying: CopyingStreams) -> None:
        streams = copying.streams
        streams.flights.leave(streams.claim())
        again = streams.claim()
        copying.gate.set()
        assert torch.equal((await again.result).embeds, EMBEDS)
        assert streams.leaders == []

    async def test_when_the_cache_closes_those_that_wait_are_asked_to_lead(
        self, copying: CopyingStreams
    ) -> None:
        running, waiting = copying.streams.claim(), copying.streams.claim((*KEY[:2], 4))
        closing = asyncio.create_task(asyncio.to_thread(copying.cache.close))
        await asyncio.wait_for(copying.streams.asked.wait(), 10)
        assert copying.streams.leaders == [waiting]
        copying.gate.set()
        await closing
        assert torch.equal((await running.result).embeds, EMBEDS)


class CopyingStreams:
    def __init__(self) -> None:
        self.gate = threading.Event()
        self.num_copies = 0
        self.fails = False
        self.cache = TileCache(0, 1 << 20, self._to_host)
        self.streams = Streams(self.cache)
        for number in (3, 4):
            self.cache.put((*KEY[:2], number), TILE)

    def _to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        assert self.gate.wait(10)
        self.num_copies += 1
        if self.fails:
            raise RuntimeError("secret of a library")
        return tensor.clone()
