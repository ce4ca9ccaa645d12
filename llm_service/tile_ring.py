"""The slots of one ring: free, lent to a stream, or in limbo because their stream was given up.

A slot in limbo may still be written, and is free again when the encoder says that the stream has ended there.
Knows nothing about messages, tensors or how the ring came about.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from protos.ring import Ring


@dataclass(frozen=True)
class _Limbo:
    slots: frozenset[int]
    since_s: float


class TileRing:
    """All of it happens on one event loop."""

    def __init__(self, ring: Ring) -> None:
        """Takes the ring over."""
        self.nonce = ring.nonce
        self._ring = ring
        # A stack: the slot that came back last is the one that is still in the CPU's cache.
        self._free = list(reversed(range(ring.geometry.num_slots)))
        self._leases: dict[int, RingLease] = {}
        self._limbo: dict[int, _Limbo] = {}
        self._ended: set[int] = set()  # streams whose lease is not closed yet
        self._num_streams = 0
        self._is_retired = False
        self._on_idle: Callable[[], None] | None = None

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_lent(self) -> int:
        """Slots that streams have, or had when they were given up."""
        return self._ring.geometry.num_slots - len(self._free)

    @property
    def limbo_s(self) -> float:
        """How long the slots of some given-up stream have been waiting."""
        oldest_s = min((limbo.since_s for limbo in self._limbo.values()), default=None)
        return 0.0 if oldest_s is None else time.monotonic() - oldest_s

    def lease(self) -> RingLease:
        """For a new stream."""
        self._num_streams += 1
        lease = self._leases[self._num_streams] = RingLease(self, self._num_streams)
        return lease

    def take(self, most: int) -> list[int]:
        """Free slots, none where there are none: those tiles come inline.

        Waiting for a slot could deadlock, starve a stream or turn priorities round; inline costs CPU only.
        """
        return [self._free.pop() for _ in range(max(min(most, len(self._free)), 0))]

    def free(self, slots: Iterable[int]) -> None:
        if not self._is_retired:
            self._free.extend(slots)

    def note_ended(self, streams: Iterable[int]) -> None:
        """The encoder has let go of what it held for these."""
        for stream in streams:
            limbo = self._limbo.pop(stream, None)
            if limbo is not None:
                self.free(limbo.slots)
            elif stream in self._leases:
                self._ended.add(stream)

    def end_lease(self, stream: int, slots: Iterable[int]) -> None:
        """`slots` are those that the stream had not got back."""
        del self._leases[stream]
        left = frozenset(slots)
        if stream in self._ended:
            self._ended.remove(stream)
            self.free(left)
        elif left and not self._is_retired:
            self._limbo[stream] = _Limbo(left, time.monotonic())
        if not self._leases:
            if self._on_idle is not None:
                self._on_idle()
            if self._is_retired:
                self._ring.close()

    def when_idle(self, call: Callable[[], None]) -> None:
        """Call it once no stream uses the ring; no lease may be taken any more."""
        self._on_idle = call
        if not self._leases:
            call()

    def retire(self) -> None:
        """No slot is lent again; what streams have still got can be read until they are closed."""
        self._is_retired = True
        self._free.clear()
        self._limbo.clear()
        if not self._leases:
            self._ring.close()

    def view(self, slot: int, num_bytes: int) -> memoryview | None:
        """The first bytes of a slot; None where it has fewer."""
        return self._ring.slot(slot)[:num_bytes] if num_bytes <= self._ring.geometry.slot_bytes else None


class RingLease:
    """What one Encode stream has of a ring."""

    def __init__(self, ring: TileRing, stream: int) -> None:
        self.nonce = ring.nonce
        self.stream = stream
        self._ring = ring
        self._slots: set[int] = set()
        self._is_closed = False

    def take(self, most: int) -> list[int]:
        """At most so many slots, for as many tiles."""
        slots = [] if self._is_closed else self._ring.take(most)
        self._slots.update(slots)
        return slots

    @property
    def num_free(self) -> int:
        """Of the ring."""
        return self._ring.num_free

    @property
    def num_lent(self) -> int:
        return len(self._slots)

    def view(self, slot: int, num_bytes: int) -> memoryview | None:
        """The first bytes of a slot of this stream; None where it is not this stream's, or has fewer."""
        return self._ring.view(slot, num_bytes) if slot in self._slots else None

    def give_back(self, slots: Iterable[int]) -> None:
        """Of slots that the encoder does not write any more, and that nobody reads."""
        mine = self._slots.intersection(slots)
        self._slots -= mine
        self._ring.free(mine)

    def give_back_all(self) -> None:
        """The encoder has said that this stream uses none."""
        self.give_back(set(self._slots))

    def close(self) -> None:
        """Idempotent; slots that have not been given back are in limbo from here on."""
        if not self._is_closed:
            self._is_closed = True
            self._ring.end_lease(self.stream, self._slots)
