"""Memory for finished tiles that front ends of this host can read where it is: slots of a ring.

A slot is in use as long as anything holds a tensor over it, and free with the last of them.
"""

from __future__ import annotations

import logging
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch

from protos.page_lock import PageLock
from protos.ring import Ring, RingGeometry, RingRefused

# Forwards on their way and tiles that wait for their clients take what they like of the rest; of these, tiles
# that are elsewhere (from a cache, in 8 bits, computed on the CPU) can always have one to be copied into.
_SHARE_FOR_COPIES = 0.125

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlacedTile:
    """What a reader is told, and what keeps the slot."""

    slot: int
    sequence: int
    memory: memoryview


class TileSlots:
    """Any thread may make tiles and let them go."""

    def __init__(self, ring: Ring) -> None:
        """Takes the ring over."""
        self.ring = ring
        self._num_kept = int(ring.geometry.num_slots * _SHARE_FOR_COPIES)
        # A stack: what came back last is still in the CPU's cache. Its operations are atomic; a lock could be
        # asked for twice by one thread, for collecting garbage frees slots anywhere.
        self._free = deque(range(ring.geometry.num_slots))
        self._is_closed = False
        self._lock: PageLock | None = None
        self._start = _address(np.frombuffer(ring.slot(0), np.uint8))
        self._num_bytes = ring.geometry.num_slots * ring.geometry.slot_bytes

    @classmethod
    def create(cls, total_bytes: int, tile_bytes: int, most_slots: int) -> TileSlots | None:
        """None, and a line in the log, where the memory cannot be had."""
        try:
            geometry = RingGeometry.fitting(total_bytes, tile_bytes, most_slots)
            return cls(Ring.create(geometry))
        except (OSError, RingRefused) as error:
            log.warning("no shared memory, tiles go in messages: %s", error)
            return None

    @property
    def num_in_use(self) -> int:
        return self.ring.geometry.num_slots - len(self._free)

    def pin(self) -> None:
        """Let the GPU copy into it while the CPU goes on."""
        self._lock = PageLock(self._start, self._num_bytes, "tile slots")

    def new_tile(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor | None:
        """Memory in a slot, not initialised; None where too few are free."""
        if len(self._free) <= self._num_kept:
            return None
        memory = self._take(prod(shape) * dtype.itemsize)
        return None if memory is None else torch.from_numpy(memory).view(dtype).view(*shape)

    def place(self, payload: memoryview) -> PlacedTile | None:
        """A payload that is in a slot as it is, another as a copy; None where none is free or large enough.

        The copy takes 0.1 to 0.2 ms for 2 MiB here: handing it to a thread and back costs as much.
        """
        if self._is_closed:
            return None
        offset = _address(np.frombuffer(payload, np.uint8)) - self._start
        if not 0 <= offset < self._num_bytes:
            memory = self._take(payload.nbytes)
            if memory is None:
                return None
            memory.data[:] = payload
            offset, payload = _address(memory) - self._start, memory.data
        slot = offset // self.ring.geometry.slot_bytes
        return PlacedTile(slot, self.ring.sequence(slot), payload)

    def close(self) -> None:
        """Tiles that are left can still be read, here and by those who have them; there are no new ones."""
        self._is_closed = True
        if self._lock is not None:
            self._lock.release()
        self.ring.close()

    def _take(self, num_bytes: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]] | None:
        """The first bytes of a free slot, which is free again when this array and its views have gone."""
        if num_bytes > self.ring.geometry.slot_bytes or self._is_closed:
            return None
        try:
            slot = self._free.pop()
        except IndexError:
            return None
        self.ring.advance(slot)
        memory = np.frombuffer(self.ring.slot(slot), np.uint8, num_bytes)
        weakref.finalize(memory, self._free.append, slot).atexit = False
        return memory


def _address(memory: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> int:
    return int(memory.__array_interface__["data"][0])
