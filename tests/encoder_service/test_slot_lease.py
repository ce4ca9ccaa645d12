"""What one stream's client has not returned, and when the encoder waits for it."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Coroutine, Iterator

import pytest

from encoder_service import slot_lease as module
from encoder_service.slot_lease import MOST_AWAY, SlotLease
from encoder_service.tile_slots import TileSlots
from protos.errors import InvalidRequest
from protos.ring import PAGE_BYTES, Ring, RingGeometry

PAYLOAD = memoryview(b"visual tokens")


@pytest.fixture
def slots() -> Iterator[TileSlots]:
    created = TileSlots(Ring.create(RingGeometry(MOST_AWAY + 2, PAGE_BYTES)))
    yield created
    created.close()


@pytest.fixture
def lease(slots: TileSlots) -> SlotLease:
    return SlotLease(slots)


def place(lease: SlotLease, payload: memoryview = PAYLOAD) -> int:
    """Its slot."""
    placed = lease.place(payload)
    assert placed is not None
    return placed.slot


def place_most(lease: SlotLease) -> list[int]:
    return [place(lease) for _ in range(MOST_AWAY)]


async def start(wait: Coroutine[None, None, None]) -> asyncio.Task[None]:
    waiting = asyncio.create_task(wait)
    await asyncio.sleep(0)
    assert not waiting.done()
    return waiting


class TestPlace:
    def test_no_more_tiles_are_away_than_the_limit(self, lease: SlotLease, slots: TileSlots) -> None:
        place_most(lease)
        assert not lease.has_slot
        assert lease.place(PAYLOAD) is None
        assert slots.num_in_use == MOST_AWAY

    def test_a_slot_that_came_back_makes_room_for_one_tile(self, lease: SlotLease) -> None:
        lease.take_back(place_most(lease)[3:4])
        assert lease.has_slot
        place(lease)
        assert not lease.has_slot

    def test_a_tile_that_finds_no_slot_is_not_away(self, lease: SlotLease, slots: TileSlots) -> None:
        taken = [slots.place(PAYLOAD) for _ in range(MOST_AWAY + 2)]
        assert lease.has_slot and lease.place(PAYLOAD) is None
        taken.clear()
        place_most(lease)

    def test_streams_have_limits_of_their_own(self, lease: SlotLease, slots: TileSlots) -> None:
        place_most(lease)
        place(SlotLease(slots))


class TestTakeBack:
    def test_frees_the_slot(self, lease: SlotLease, slots: TileSlots) -> None:
        slot = place(lease)
        gc.collect()
        assert slots.num_in_use == 1
        lease.take_back([slot])
        gc.collect()
        assert slots.num_in_use == 0

    def test_refuses_a_slot_that_is_not_away(self, lease: SlotLease, slots: TileSlots) -> None:
        slot, other = place(lease), place(SlotLease(slots))
        lease.take_back([slot])
        for wrong in (slot, other + 1, 1 << 31):
            with pytest.raises(InvalidRequest, match="not on its way") as refused:
                lease.take_back([wrong])
            assert refused.value.field == "grant.slots"

    def test_refuses_the_slot_of_another_stream(self, lease: SlotLease, slots: TileSlots) -> None:
        slot = place(lease)
        with pytest.raises(InvalidRequest):
            SlotLease(slots).take_back([slot])

    def test_a_tile_placed_twice_must_come_back_twice(self, lease: SlotLease, slots: TileSlots) -> None:
        placed = slots.place(PAYLOAD)
        assert placed is not None
        assert [place(lease, placed.memory) for _ in range(2)] == [placed.slot] * 2
        slot = placed.slot
        del placed
        for num_in_use in (1, 0):
            lease.take_back([slot])
            gc.collect()
            assert slots.num_in_use == num_in_use
        with pytest.raises(InvalidRequest):
            lease.take_back([slot])


class TestWait:
    async def test_is_over_at_once_where_a_tile_may_be_placed(self, lease: SlotLease) -> None:
        async with asyncio.timeout(0):
            await lease.wait()

    async def test_ends_when_a_slot_comes_back(self, lease: SlotLease) -> None:
        slot = place_most(lease)[0]
        waiting = await start(lease.wait())
        lease.take_back([slot])
        await waiting
        assert place(lease) == slot

    async def test_goes_on_when_a_grant_returns_nothing(self, lease: SlotLease) -> None:
        slot = place_most(lease)[0]
        waiting = await start(lease.wait())
        lease.take_back([])
        await asyncio.sleep(0)
        assert not waiting.done()
        lease.take_back([slot])
        await waiting

    async def test_ends_with_the_clients_last_word(self, lease: SlotLease) -> None:
        place_most(lease)
        waiting = await start(lease.wait())
        lease.end_returns()
        await waiting
        assert lease.place(PAYLOAD) is None
        await lease.wait()

    async def test_ends_after_a_while_and_is_not_repeated_until_a_slot_comes_back(
        self, lease: SlotLease, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        away = place_most(lease)
        monkeypatch.setattr(module, "RETURN_TIMEOUT_S", 0.01)
        await lease.wait()
        assert not lease.has_slot
        monkeypatch.setattr(module, "RETURN_TIMEOUT_S", 1e6)
        async with asyncio.timeout(0):
            await lease.wait()
        lease.take_back(away[:1])
        place(lease)
        waiting = await start(lease.wait())
        lease.take_back(away[1:2])
        await waiting


class TestAllReturned:
    async def test_is_so_at_once_where_nothing_is_away(self, lease: SlotLease) -> None:
        async with asyncio.timeout(0):
            await lease.all_returned()
            lease.take_back([place(lease)])
            await lease.all_returned()

    async def test_is_so_with_the_last_return(self, lease: SlotLease) -> None:
        away = [place(lease) for _ in range(3)]
        waiting = await start(lease.all_returned())
        for slot in away[:2]:
            lease.take_back([slot])
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert not waiting.done()
        lease.take_back(away[2:])
        await waiting

    async def test_is_over_with_the_clients_last_word(self, lease: SlotLease) -> None:
        place(lease)
        waiting = await start(lease.all_returned())
        lease.end_returns()
        await waiting
        async with asyncio.timeout(0):
            await lease.all_returned()

    async def test_is_over_when_the_client_returns_nothing_for_a_while(
        self, lease: SlotLease, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        away = place_most(lease)
        monkeypatch.setattr(module, "RETURN_TIMEOUT_S", 0.01)
        waiting = await start(lease.all_returned())
        lease.take_back(away[:1])
        async with asyncio.timeout(5.0):
            await waiting
        monkeypatch.setattr(module, "RETURN_TIMEOUT_S", 1e6)
        async with asyncio.timeout(0):
            await lease.all_returned()


class TestClose:
    def test_frees_what_is_away(self, lease: SlotLease, slots: TileSlots) -> None:
        place_most(lease)
        lease.close()
        lease.close()
        gc.collect()
        assert slots.num_in_use == 0

    async def test_nothing_is_placed_or_waited_for_after_it(self, lease: SlotLease) -> None:
        place_most(lease)
        lease.close()
        assert not lease.has_slot and lease.place(PAYLOAD) is None
        async with asyncio.timeout(0):
            await lease.wait()
            await lease.all_returned()


async def test_without_slots_there_is_nothing_to_place_or_to_wait_for() -> None:
    lease = SlotLease(None)
    assert not lease.has_ring and not lease.has_slot
    assert lease.place(PAYLOAD) is None
    await lease.wait()
    await lease.all_returned()
    lease.take_back([])
    with pytest.raises(InvalidRequest):
        lease.take_back([0])
    lease.close()
