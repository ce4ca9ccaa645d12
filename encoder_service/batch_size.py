"""How many tiles a forward should take at most: as few as compute a tile nearly as fast as a full batch.

Knows nothing about the tower but what a forward of so many tiles takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

# What a batch of twice the size must save of a tile's time to be worth its later first tile: while the
# tower is idle, and while tiles wait for it anyway.  InternViT-300M on an H200 comes to 4 and 16, 6B to 1.
FIRST_GAIN, GAIN = 0.10, 0.01


@dataclass(frozen=True)
class BatchSizes:
    """Most tiles of a forward; `first` of one that finds the tower idle."""

    first: int
    most: int


def choose_batch_sizes(forward_s: Callable[[int], float], most: int) -> BatchSizes:
    """Double the batch while that makes a tile cheaper.  `forward_s` measures a forward of so many tiles."""
    measured: dict[int, float] = {}

    def tile_s(num_tiles: int) -> float:
        if num_tiles not in measured:
            measured[num_tiles] = forward_s(num_tiles) / num_tiles
        return measured[num_tiles]

    def grow(size: int, gain: float) -> int:
        while size < most and tile_s(min(2 * size, most)) < (1 - gain) * tile_s(size):
            size = min(2 * size, most)
        return size

    first = grow(1, FIRST_GAIN)
    return BatchSizes(first, grow(first, GAIN))


def resolve_batch_sizes(first: int, most: int, limit: int, forward_s: Callable[[int], float]) -> BatchSizes:
    """Measure those that are 0, up to `limit` tiles."""
    if not (first and most):
        chosen = choose_batch_sizes(forward_s, most or limit)
        first, most = first or chosen.first, most or chosen.most
    return BatchSizes(min(first, most), most)
