"""The slots that one stream's client has been sent and has not returned, and whether it may have more.

For the event loop's thread only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from encoder_service.tile_slots import PlacedTile, TileSlots
from protos.errors import InvalidRequest

# That a client has at a time: it reads one message of eight tiles while the next is made.
MOST_AWAY = 16
# A client returns a slot as soon as it has read it; one that does not gets its tiles inline.
RETURN_TIMEOUT_S = 0.2


class SlotLease:
    """Keeps what it has placed until the client returns it, or the stream ends."""

    def __init__(self, slots: TileSlots | None) -> None:
        """Without slots every tile goes inline."""
        self._slots = slots
        self._away: dict[int, list[PlacedTile]] = {}  # of a tile that was granted again, several
        self._num_away = 0
        self._is_patient = True  # the client returns slots
        self._returned = asyncio.Event()

    @property
    def has_ring(self) -> bool:
        return self._slots is not None

    @property
    def has_slot(self) -> bool:
        """One more tile may be placed without waiting for the client."""
        return self._slots is not None and self._num_away < MOST_AWAY

    def take_back(self, slots: Sequence[int]) -> None:
        """Raises InvalidRequest for a slot that the client has not got."""
        for slot in slots:
            if not self._away.get(slot):
                raise InvalidRequest(f"slot {slot} is not on its way", field="grant.slots")
            self._away[slot].pop()
            self._num_away -= 1
        if slots:
            self._is_patient = True
            self._returned.set()

    def end_returns(self) -> None:
        """The client has half-closed."""
        self._is_patient = False
        self._returned.set()

    async def wait(self) -> None:
        """Return when a tile may be placed, or no slot is to come back."""
        await self._wait_while(lambda: self._slots is not None and not self.has_slot)

    async def all_returned(self) -> None:
        """Return when the client has read everything, or returns nothing any more."""
        await self._wait_while(lambda: self._num_away > 0)

    async def _wait_while(self, is_missing: Callable[[], bool]) -> None:
        while self._is_patient and is_missing():
            self._returned.clear()
            try:
                async with asyncio.timeout(RETURN_TIMEOUT_S):
                    await self._returned.wait()
            except TimeoutError:
                self._is_patient = False

    def place(self, payload: memoryview) -> PlacedTile | None:
        """A tile in its slot, which is the client's to read; None: it must go inline."""
        placed = self._slots.place(payload) if self._slots is not None and self.has_slot else None
        if placed is not None:
            self._away.setdefault(placed.slot, []).append(placed)
            self._num_away += 1
        return placed

    def close(self) -> None:
        """Idempotent; what the client has not read yet may be overwritten."""
        self._slots = None
        self._away.clear()
        self._num_away = 0
