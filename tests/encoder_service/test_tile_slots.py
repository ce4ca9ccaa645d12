"""Tiles in shared memory: where they lie, how long a slot is in use, and what must be copied."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from select import select

import pytest
import torch

from encoder_service.tile_slots import PlacedTile, TileSlots
from protos.ring import PAGE_BYTES, Ring, RingGeometry, RingReader
from protos.tensors import tensor_bytes

NUM_SLOTS = 8
NUM_FOR_COPIES = 1
SHAPE = (2, 3)
FOREIGN = memoryview(b"visual tokens")


@pytest.fixture
def slots() -> Iterator[TileSlots]:
    created = TileSlots(Ring.create(RingGeometry(NUM_SLOTS, PAGE_BYTES)))
    yield created
    created.close()


@pytest.fixture
def reader(slots: TileSlots) -> Iterator[RingReader]:
    with ThreadPoolExecutor(1) as thread:
        thread.submit(hand_over, slots.ring)
        received = RingReader.receive(slots.ring.name, slots.ring.geometry)
    yield received
    received.close()


def hand_over(ring: Ring) -> None:
    select([ring.socket], [], [], 5.0)
    ring.hand_over()


def new_tile(slots: TileSlots, value: float = 0.0) -> torch.Tensor:
    tile = slots.new_tile(SHAPE, torch.float16)
    assert tile is not None
    return tile.fill_(value)


def place(slots: TileSlots, payload: memoryview = FOREIGN) -> PlacedTile:
    placed = slots.place(payload)
    assert placed is not None
    return placed


def content(reader: RingReader, placed: PlacedTile) -> bytes:
    assert reader.sequence(placed.slot) == placed.sequence
    return bytes(reader.slot(placed.slot)[: placed.memory.nbytes])


class TestNewTile:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
    def test_has_the_shape_and_type_that_were_asked_for(self, slots: TileSlots, dtype: torch.dtype) -> None:
        tile = slots.new_tile((4, 5, 6), dtype)
        assert tile is not None
        assert (tile.shape, tile.dtype, tile.is_contiguous()) == ((4, 5, 6), dtype, True)

    def test_lies_in_the_ring(self, slots: TileSlots, reader: RingReader) -> None:
        tile = new_tile(slots, 7.0)
        found = [bytes(reader.slot(slot)[: tile.nbytes]) for slot in range(NUM_SLOTS)]
        assert found.count(bytes(tensor_bytes(tile))) == 1

    def test_may_be_as_large_as_a_slot_and_no_larger(self, slots: TileSlots) -> None:
        assert slots.new_tile((PAGE_BYTES,), torch.uint8) is not None
        assert slots.new_tile((PAGE_BYTES + 1,), torch.uint8) is None
        assert slots.num_in_use == 0

    def test_tiles_have_slots_of_their_own(self, slots: TileSlots) -> None:
        tiles = [new_tile(slots, number) for number in range(NUM_SLOTS - NUM_FOR_COPIES)]
        assert [tile[0, 0].item() for tile in tiles] == list(range(len(tiles)))

    def test_leaves_the_share_for_copies(self, slots: TileSlots) -> None:
        tiles = [new_tile(slots) for _ in range(NUM_SLOTS - NUM_FOR_COPIES)]
        assert slots.new_tile(SHAPE, torch.float16) is None
        copies = [place(slots) for _ in range(NUM_FOR_COPIES)]
        assert slots.num_in_use == len(tiles) + len(copies) == NUM_SLOTS


class TestLifetime:
    def test_a_slot_is_free_when_the_tile_and_all_views_of_it_have_gone(self, slots: TileSlots) -> None:
        tile = new_tile(slots)
        views = [tile[1], tile.view(-1), tile.numpy()[:1], tensor_bytes(tile)[3:]]
        del tile
        while views:
            gc.collect()
            assert slots.num_in_use == 1
            views.pop()
        gc.collect()
        assert slots.num_in_use == 0

    def test_its_sequence_changes_when_it_is_used_again(self, slots: TileSlots, reader: RingReader) -> None:
        first = place(slots)
        slot, sequence = first.slot, first.sequence
        del first
        gc.collect()
        assert reader.sequence(slot) == sequence
        again = place(slots)
        assert again.slot == slot and again.sequence != sequence
        assert reader.sequence(slot) == again.sequence

    def test_tiles_outlive_the_ring(self, slots: TileSlots, reader: RingReader) -> None:
        tile = new_tile(slots, 7.0)
        placed = place(slots, tensor_bytes(tile))
        slots.close()
        assert (tile == 7).all()
        assert content(reader, placed) == bytes(tensor_bytes(tile))

    def test_none_is_taken_after_close(self, slots: TileSlots) -> None:
        slots.close()
        assert slots.new_tile(SHAPE, torch.float16) is None
        assert slots.place(FOREIGN) is None
        assert slots.num_in_use == 0

    def test_a_slot_comes_back_also_after_close(self, slots: TileSlots) -> None:
        placed = [place(slots)]
        slots.close()
        placed.clear()
        gc.collect()
        assert slots.num_in_use == 0

    def test_threads_lose_no_slot_and_share_none(self, slots: TileSlots) -> None:
        num_done = [0] * 3

        def work(number: int) -> None:
            for _ in range(300):
                tile = new_tile(slots, number)
                place(slots, tensor_bytes(tile))
                time.sleep(0)
                num_done[number] += bool((tile == number).all())
                del tile

        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert num_done == [300] * 3
        gc.collect()
        kept = [place(slots) for _ in range(NUM_SLOTS)]
        assert {placed.slot for placed in kept} == set(range(NUM_SLOTS))


class TestPlace:
    def test_a_tile_in_a_slot_stays_where_it_is(self, slots: TileSlots, reader: RingReader) -> None:
        tiles = [new_tile(slots, number) for number in range(3)]
        placed = [place(slots, tensor_bytes(tile)) for tile in tiles]
        assert slots.num_in_use == 3
        assert len({tile.slot for tile in placed}) == 3
        tiles[1].fill_(7.0)
        assert [content(reader, tile) for tile in placed] == [bytes(tensor_bytes(tile)) for tile in tiles]

    def test_one_tile_placed_twice_has_one_slot(self, slots: TileSlots) -> None:
        payload = tensor_bytes(new_tile(slots))
        first, second = place(slots, payload), place(slots, payload)
        assert (first.slot, first.sequence) == (second.slot, second.sequence)
        assert slots.num_in_use == 1

    def test_other_memory_is_copied(self, slots: TileSlots, reader: RingReader) -> None:
        foreign = bytearray(FOREIGN)
        placed = place(slots, memoryview(foreign))
        foreign[:] = bytes(len(foreign))
        assert slots.num_in_use == 1
        assert content(reader, placed) == FOREIGN

    def test_what_is_larger_than_a_slot_is_not_placed(self, slots: TileSlots, reader: RingReader) -> None:
        assert content(reader, place(slots, memoryview(b"x" * PAGE_BYTES))) == b"x" * PAGE_BYTES
        assert slots.place(memoryview(bytes(PAGE_BYTES + 1))) is None
        assert slots.num_in_use == 0

    def test_nothing_is_copied_where_no_slot_is_free(self, slots: TileSlots) -> None:
        tile = new_tile(slots)
        copies = [place(slots) for _ in range(NUM_SLOTS - 1)]
        assert slots.place(FOREIGN) is None
        assert slots.place(tensor_bytes(tile)) is not None
        copies.pop()
        gc.collect()
        assert slots.place(FOREIGN) is not None

    def test_a_placed_tile_keeps_its_slot(self, slots: TileSlots) -> None:
        tile = new_tile(slots)
        placed = [place(slots, tensor_bytes(tile)), place(slots)]
        del tile
        for num_left in (2, 1, 0):
            gc.collect()
            assert slots.num_in_use == num_left
            if placed:
                placed.pop()


class TestCreate:
    @pytest.mark.parametrize(("most_slots", "num_slots"), [(2, 2), (100, 5)])
    def test_has_as_many_slots_as_fit_and_are_wanted(self, most_slots: int, num_slots: int) -> None:
        slots = TileSlots.create(11 * PAGE_BYTES, PAGE_BYTES + 1, most_slots)
        assert slots is not None
        assert slots.ring.geometry == RingGeometry(num_slots, 2 * PAGE_BYTES)
        slots.close()

    def test_says_once_that_not_one_tile_fits(self, caplog: pytest.LogCaptureFixture) -> None:
        assert TileSlots.create(PAGE_BYTES - 1, PAGE_BYTES, most_slots=8) is None
        assert_said_once(caplog)

    def test_says_once_that_the_system_has_no_memory_to_share(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.delattr(os, "memfd_create")
        assert TileSlots.create(PAGE_BYTES, PAGE_BYTES, most_slots=8) is None
        assert_said_once(caplog)


def assert_said_once(caplog: pytest.LogCaptureFixture) -> None:
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "no shared memory" in record.getMessage()
