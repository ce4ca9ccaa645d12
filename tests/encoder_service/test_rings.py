"""Whose slots are whose at the encoder, and when it waits for one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from encoder_service import rings as module
from encoder_service.rings import AttachedRing, Rings, SlotLease
from protos.errors import InvalidRequest, NotFound, Overloaded
from protos.ring import PAGE_BYTES, Ring, RingGeometry

PAYLOAD = memoryview(b"visual tokens")


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Ring]:
    """The front end's side."""
    ring = Ring.create(tmp_path, RingGeometry(4, PAGE_BYTES))
    yield ring
    ring.unlink()
    ring.close()


@pytest.fixture
def rings(tmp_path: Path) -> Rings:
    return Rings(str(tmp_path))


@pytest.fixture
def attached(rings: Rings, client: Ring) -> Iterator[AttachedRing]:
    ring = attach(rings, client)
    yield ring
    rings.retire(ring)


def attach(rings: Rings, client: Ring) -> AttachedRing:
    return rings.attach(client.path.name, client.nonce, client.geometry.num_slots, client.geometry.slot_bytes)


def content(client: Ring, slot: int) -> bytes:
    with client.slot(slot) as memory:
        return bytes(memory[: len(PAYLOAD)])


class TestPlace:
    def test_slots_are_filled_in_the_order_in_which_they_were_lent(
        self, attached: AttachedRing, client: Ring
    ) -> None:
        lease = attached.lease(1, [2, 0])
        lease.lend([3], "grant.slots")
        assert [lease.place(PAYLOAD) for _ in range(4)] == [2, 0, 3, None]
        assert [content(client, slot) == PAYLOAD for slot in range(4)] == [True, False, True, True]

    def test_a_slot_is_the_clients_once_it_is_filled(self, attached: AttachedRing) -> None:
        lease = attached.lease(1, [2])
        assert lease.place(PAYLOAD) == 2
        other = attached.lease(2, [2])
        assert other.place(PAYLOAD) == 2

    def test_nothing_is_written_to_a_retired_ring(self, rings: Rings, attached: AttachedRing) -> None:
        lease = rings.lease(attached.ring.nonce, 1, [0])
        rings.retire(attached)
        assert lease.place(PAYLOAD) is None
        lease.close()

    def test_nothing_is_written_behind_a_slot(self, attached: AttachedRing, client: Ring) -> None:
        lease = attached.lease(1, [0])
        assert lease.place(memoryview(bytes(PAGE_BYTES + 1))) is None
        assert lease.place(PAYLOAD) == 0

    def test_a_ring_that_nobody_attached_is_none(self, rings: Rings) -> None:
        lease = rings.lease(b"unknown", 1, [99])
        assert not lease.has_ring and lease.place(PAYLOAD) is None
        with pytest.raises(InvalidRequest, match="no ring"):
            lease.lend([0], "grant.slots")
        lease.close()


class TestWaiting:
    async def test_for_a_slot_that_is_away(self, attached: AttachedRing) -> None:
        lease = attached.lease(1, [0])
        lease.place(PAYLOAD)
        waiting = asyncio.create_task(lease.wait())
        await asyncio.sleep(0)
        assert not waiting.done()
        lease.lend([0], "grant.slots")
        await waiting
        assert lease.place(PAYLOAD) == 0

    async def test_for_none_where_none_was_lent(self, attached: AttachedRing) -> None:
        await attached.lease(1, []).wait()
        await SlotLease(None, 2).wait()

    async def test_ends_with_the_clients_last_word(self, attached: AttachedRing) -> None:
        lease = attached.lease(1, [0])
        lease.place(PAYLOAD)
        waiting = asyncio.create_task(lease.wait())
        await asyncio.sleep(0)
        lease.end_lending()
        await waiting
        assert lease.place(PAYLOAD) is None

    async def test_ends_after_a_while_and_is_not_repeated(
        self, attached: AttachedRing, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "LEND_TIMEOUT_S", 0.01)
        lease = attached.lease(1, [0])
        lease.place(PAYLOAD)
        await lease.wait()
        monkeypatch.setattr(module, "LEND_TIMEOUT_S", 1e6)
        await lease.wait()


class TestEnds:
    async def test_are_told_and_free_the_slots(self, attached: AttachedRing) -> None:
        first, second = attached.lease(7, [0, 1]), attached.lease(8, [2])
        with pytest.raises(InvalidRequest, match="twice"):
            attached.lease(9, [1])
        with pytest.raises(InvalidRequest, match="number"):
            attached.lease(8, [])
        first.close()
        first.close()
        second.close()
        assert await attached.next_ended() == [7, 8]
        assert attached.lease(9, [1]).place(PAYLOAD) == 1

    async def test_draining_ends_with_the_last_stream(self, rings: Rings, attached: AttachedRing) -> None:
        lease = attached.lease(1, [])
        rings.drain()
        waiting = asyncio.create_task(attached.next_ended())
        await asyncio.sleep(0)
        assert not waiting.done()
        lease.close()
        assert await waiting == [1]
        assert await attached.next_ended() == []


class TestAttach:
    def test_switched_off(self, client: Ring) -> None:
        with pytest.raises(NotFound, match="takes no rings"):
            attach(Rings(""), client)

    def test_of_another_folder(self, client: Ring) -> None:
        with pytest.raises(NotFound, match="opened"):
            attach(Rings("/proc"), client)

    def test_no_more_than_so_many(self, rings: Rings, client: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "MAX_RINGS", 0)
        with pytest.raises(Overloaded):
            attach(rings, client)

    def test_a_retired_one_is_forgotten(self, rings: Rings, client: Ring) -> None:
        for _ in range(3):
            rings.retire(attach(rings, client))
        assert len(rings) == 0
