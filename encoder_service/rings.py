"""Rings that front ends lend: which stream may write which slot, and when it has let go of its slots.

Everything happens on the event loop: once a stream's lease is closed, nothing of that stream writes any more.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from protos.errors import InvalidRequest, NotFound, Overloaded
from protos.ring import Ring, RingGeometry, RingRefused

# Front ends that use one encoder; each ring costs a descriptor and a mapping.
MAX_RINGS = 256
# A client lends a slot again as soon as it has read it; one that does not gets its tiles inline.
LEND_TIMEOUT_S = 0.2


class AttachedRing:
    """One front end's ring, from its Attach call to the end of that call."""

    def __init__(self, ring: Ring) -> None:
        self.ring = ring
        self.is_retired = False
        self.is_draining = False
        self.lent: set[int] = set()  # slots that a stream may write
        self._streams: set[int] = set()
        self._ended: list[int] = []
        self._changed = asyncio.Event()

    async def next_ended(self) -> list[int]:
        """Streams that have ended since the last call; [] at the end: the service stops and none is left."""
        while not self._ended:
            if self.is_draining and not self._streams:
                return []
            self._changed.clear()
            await self._changed.wait()
        ended, self._ended = self._ended, []
        return ended

    def drain(self) -> None:
        self.is_draining = True
        self._changed.set()

    def lease(self, stream: int, slots: Sequence[int]) -> SlotLease:
        """Begin a stream.

        Raises:
            InvalidRequest: the number or a slot is in use.
        """
        if stream in self._streams:
            raise InvalidRequest("another stream of this ring has this number", field="open.ring.stream")
        lease = SlotLease(self, stream)
        lease.lend(slots, "open.ring.slots")
        self._streams.add(stream)
        return lease

    def end(self, stream: int) -> None:
        self._streams.discard(stream)
        self._ended.append(stream)
        self._changed.set()

    def retire(self) -> None:
        """Unmap: what has not been written is not written any more."""
        self.is_retired = True
        self.ring.close()


class SlotLease:
    """The slots that one stream has been lent."""

    def __init__(self, ring: AttachedRing | None, stream: int) -> None:
        """Without a ring every tile goes inline."""
        self._ring = ring
        self._stream = stream
        self._slots: deque[int] = deque()
        self._num_away = 0  # sent with tiles, and not lent again
        self._lent = asyncio.Event()

    @property
    def has_ring(self) -> bool:
        return self._ring is not None

    @property
    def has_slot(self) -> bool:
        return bool(self._slots)

    def lend(self, slots: Sequence[int], field: str) -> None:
        """Raises InvalidRequest for a slot that is not there, or that the ring's streams have already."""
        if not slots:
            return
        if self._ring is None:
            raise InvalidRequest("this stream has no ring", field=field)
        num_slots = self._ring.ring.geometry.num_slots
        if any(slot >= num_slots for slot in slots):
            raise InvalidRequest(f"the ring has {num_slots} slots", field=field)
        if len(set(slots)) < len(slots) or not self._ring.lent.isdisjoint(slots):
            raise InvalidRequest("a slot is lent twice", field=field)
        self._ring.lent.update(slots)
        self._slots.extend(slots)
        self._num_away = max(self._num_away - len(slots), 0)
        self._lent.set()

    def end_lending(self) -> None:
        """The client has half-closed."""
        self._num_away = 0
        self._lent.set()

    async def wait(self) -> None:
        """Return when there is a slot, or none is to come."""
        while not self._slots and self._num_away:
            self._lent.clear()
            try:
                async with asyncio.timeout(LEND_TIMEOUT_S):
                    await self._lent.wait()
            except TimeoutError:
                self._num_away = 0

    def place(self, payload: memoryview) -> int | None:
        """Copy a tile into a slot, which is the client's from then on; None: it must go inline.

        A copy on the event loop, 0.1 to 0.2 ms for 2 MiB: handing it to a thread and back costs as much.
        """
        ring = self._ring
        if ring is None or ring.is_retired or not self._slots:
            return None
        if payload.nbytes > ring.ring.geometry.slot_bytes:
            return None
        slot = self._slots.popleft()
        with ring.ring.slot(slot) as memory:
            memory[: payload.nbytes] = payload
        ring.lent.discard(slot)
        self._num_away += 1
        return slot

    def close(self) -> None:
        """Let go of all slots, and let the client know."""
        if self._ring is not None:
            self._ring.lent.difference_update(self._slots)
            self._ring.end(self._stream)
            self._ring = None


class Rings:
    """All rings of the service, by nonce, which only the front end knows that made the ring."""

    def __init__(self, folder: str) -> None:
        """An empty folder refuses all."""
        self._folder = folder
        self._rings: dict[bytes, AttachedRing] = {}
        self._is_draining = False

    def __len__(self) -> int:
        return len(self._rings)

    def attach(self, name: str, nonce: bytes, num_slots: int, slot_bytes: int) -> AttachedRing:
        """Map a ring; `retire` ends it.

        Raises:
            NotFound: it is not in our folder, or not what was announced.
            Overloaded: too many are attached.
        """
        if not self._folder:
            raise NotFound("this encoder takes no rings")
        if self._is_draining or len(self._rings) >= MAX_RINGS:
            raise Overloaded("this encoder takes no more rings")
        try:
            ring = Ring.open(Path(self._folder), name, nonce, RingGeometry(num_slots, slot_bytes))
        except RingRefused as error:
            raise NotFound(str(error)) from error
        if nonce in self._rings:
            ring.close()
            raise NotFound("the ring is attached already")
        attached = self._rings[nonce] = AttachedRing(ring)
        return attached

    def lease(self, nonce: bytes, stream: int, slots: Sequence[int]) -> SlotLease:
        """Of a stream that just begins; without a ring where it names none that we have.

        Raises:
            InvalidRequest: the stream's number or a slot is in use.
        """
        attached = self._rings.get(nonce)
        return SlotLease(None, stream) if attached is None else attached.lease(stream, slots)

    def retire(self, attached: AttachedRing) -> None:
        self._rings.pop(attached.ring.nonce, None)
        attached.retire()

    def drain(self) -> None:
        """Let Attach calls, which never end by themselves, end with their last stream."""
        self._is_draining = True
        for attached in self._rings.values():
            attached.drain()
