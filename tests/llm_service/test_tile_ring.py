"""Slots of a ring: lent, given back, in limbo, and never lent twice."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_service.tile_ring import RingLease, TileRing
from protos.ring import PAGE_BYTES, Ring, RingGeometry

NUM_SLOTS = 4


@pytest.fixture
def file(tmp_path: Path) -> Ring:
    return Ring.create(tmp_path, RingGeometry(NUM_SLOTS, PAGE_BYTES))


@pytest.fixture
def ring(file: Ring) -> Iterator[TileRing]:
    tiles = TileRing(file)
    yield tiles
    file.close()


def is_mapped(file: Ring) -> bool:
    return str(file.path) in Path("/proc/self/maps").read_text()


class TestLending:
    def test_as_many_as_there_are(self, ring: TileRing) -> None:
        first, second = ring.lease(), ring.lease()
        assert ring.num_lent == 0
        assert sorted(first.take(3) + second.take(3)) == list(range(NUM_SLOTS))
        assert ring.num_lent == NUM_SLOTS
        assert first.take(1) == second.take(1) == []

    def test_what_came_back_last_goes_out_first(self, ring: TileRing) -> None:
        lease = ring.lease()
        slots = lease.take(NUM_SLOTS)
        lease.give_back(slots[:1])
        assert lease.take(NUM_SLOTS) == slots[:1]

    def test_given_back_twice_is_lent_once(self, ring: TileRing) -> None:
        lease = ring.lease()
        slots = lease.take(1)
        lease.give_back(slots)
        lease.give_back(slots)
        assert ring.num_free == NUM_SLOTS

    def test_streams_have_numbers_of_their_own(self, ring: TileRing) -> None:
        numbers = {ring.lease().stream for _ in range(10)}
        assert len(numbers) == 10

    def test_a_view_has_the_bytes_of_its_slot(self, ring: TileRing, file: Ring) -> None:
        lease = ring.lease()
        [slot] = lease.take(1)
        with file.slot(slot) as memory:
            memory[:3] = b"abc"
        view = lease.view(slot, 3)
        assert view is not None and bytes(view) == b"abc"
        assert lease.view(slot, PAGE_BYTES + 1) is None
        view.release()

    def test_a_stream_has_no_view_of_anothers_slot(self, ring: TileRing) -> None:
        first, second = ring.lease(), ring.lease()
        [slot] = first.take(1)
        assert second.view(slot, 1) is None
        assert second.view(NUM_SLOTS, 1) is None


class TestLimbo:
    def test_slots_of_a_given_up_stream_wait_for_the_encoder(self, ring: TileRing) -> None:
        lease = ring.lease()
        lease.take(3)
        lease.close()
        assert ring.num_free == 1
        ring.note_ended([lease.stream + 1])
        assert ring.num_free == 1
        ring.note_ended([lease.stream])
        assert ring.num_free == NUM_SLOTS
        ring.note_ended([lease.stream])
        assert ring.num_free == NUM_SLOTS

    def test_the_encoder_may_say_it_first(self, ring: TileRing) -> None:
        """Tiles that it sent before may still be unread: they are ours until the stream is closed here."""
        lease = ring.lease()
        lease.take(3)
        ring.note_ended([lease.stream])
        assert ring.num_free == 1
        lease.close()
        assert ring.num_free == NUM_SLOTS

    def test_a_stream_that_got_everything_back_waits_for_nothing(self, ring: TileRing) -> None:
        lease = ring.lease()
        lease.give_back(lease.take(2))
        lease.close()
        lease.close()
        assert (ring.num_free, ring.limbo_s) == (NUM_SLOTS, 0)

    def test_a_refused_stream_has_its_slots_at_once(self, ring: TileRing) -> None:
        lease = ring.lease()
        lease.take(2)
        lease.give_back_all()
        lease.close()
        assert ring.num_free == NUM_SLOTS

    def test_how_long_is_known(self, ring: TileRing) -> None:
        lease = ring.lease()
        lease.take(1)
        assert ring.limbo_s == 0
        lease.close()
        assert ring.limbo_s > 0
        ring.note_ended([lease.stream])
        assert ring.limbo_s == 0

    def test_a_closed_stream_takes_none(self, ring: TileRing) -> None:
        lease = ring.lease()
        lease.close()
        assert lease.take(1) == [] and ring.num_free == NUM_SLOTS


class TestEnd:
    def test_idle_is_said_when_the_last_stream_has_gone(self, ring: TileRing) -> None:
        first, second = ring.lease(), ring.lease()
        said: list[int] = []
        ring.when_idle(lambda: said.append(1))
        first.close()
        assert said == []
        second.close()
        assert said == [1]

    def test_an_idle_ring_says_so_at_once(self, ring: TileRing) -> None:
        said: list[int] = []
        ring.when_idle(lambda: said.append(1))
        assert said == [1]

    def test_a_retired_ring_is_unmapped_with_its_last_stream(self, ring: TileRing, file: Ring) -> None:
        lease = ring.lease()
        taken = lease.take(1)
        ring.retire()
        assert is_mapped(file) and lease.take(1) == []
        view = lease.view(taken[0], 1)
        assert view is not None
        view.release()
        lease.give_back(taken)
        assert ring.num_free == 0
        lease.close()
        assert not is_mapped(file)

    def test_a_ring_without_streams_is_unmapped_at_once(self, ring: TileRing, file: Ring) -> None:
        ring.retire()
        assert not is_mapped(file)


@pytest.mark.parametrize("seed", range(20))
def test_no_slot_is_ever_with_two(ring: TileRing, seed: int) -> None:
    """A random life: a slot that is free, lent or in limbo is exactly one of these."""
    chance = random.Random(seed)
    open_leases: dict[int, tuple[RingLease, list[int]]] = {}
    given_up: dict[int, list[int]] = {}
    for _ in range(500):
        action = chance.randrange(4)
        if action == 0:
            lease = ring.lease()
            open_leases[lease.stream] = (lease, lease.take(chance.randrange(4)))
        elif open_leases and action == 1:
            lease, slots = open_leases[chance.choice(list(open_leases))]
            lease.give_back(slots[:1])
            del slots[:1]
        elif open_leases and action == 2:
            lease, slots = open_leases.pop(chance.choice(list(open_leases)))
            lease.close()
            given_up[lease.stream] = slots
        elif given_up:
            stream = chance.choice(list(given_up))
            del given_up[stream]
            ring.note_ended([stream])
        away = [slot for _, slots in open_leases.values() for slot in slots]
        away += [slot for slots in given_up.values() for slot in slots]
        assert len(away) == len(set(away)) and ring.num_free == NUM_SLOTS - len(away)
