"""Where objects stand: scattered, in rows, columns and grids. Spots never touch each other or the border."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

GRIDS = {
    1: ((1, 1), (3, 3), (3, 3)),
    2: ((2, 1), (1, 2), (2, 2), (3, 3)),
    3: ((3, 1), (1, 3), (2, 2), (3, 3)),
    4: ((4, 1), (1, 4), (2, 2), (3, 3)),
    5: ((5, 1), (1, 5), (3, 2), (3, 3)),
    6: ((6, 1), (3, 2), (2, 3), (3, 3)),
    7: ((4, 2), (2, 4), (3, 3)),
    8: ((4, 2), (2, 4), (3, 3)),
}
MOST_OBJECTS = max(GRIDS)
REACH = 1.3  # how far a drawn object may reach, in radii, with a gap to the next one
LARGEST_SHARE = 0.55  # of the shorter side


@dataclass(frozen=True)
class Spot:
    """Centre and diameter in pixels."""

    x: float
    y: float
    diameter: float


def smallest_diameter(size: tuple[int, int], level: float) -> float:
    """Pixels; at level 1 still about 20 on a thumbnail of 224."""
    share = 0.32 - 0.22 * level
    return min(0.5 * min(size), max(share * min(size), (0.16 - 0.07 * level) * max(size)))


def lay_out(rng: random.Random, size: tuple[int, int], level: float, most: int) -> list[Spot]:
    """1 to `most` spots in random order."""
    assert 1 <= most <= MOST_OBJECTS
    count = rng.randint(1, most)
    if rng.random() < 0.4:
        return _scatter(rng, size, level, count)
    return _grid(rng, size, level, count, rng.choice(GRIDS[count]))


def _scatter(rng: random.Random, size: tuple[int, int], level: float, count: int) -> list[Spot]:
    smallest, largest = smallest_diameter(size, level), LARGEST_SHARE * min(size)
    largest = max(smallest, largest / math.sqrt(max(1, count - 1)))
    spots: list[Spot] = []
    for _ in range(12 * count):
        diameter = rng.uniform(smallest, largest)
        margin = diameter * REACH / 2
        spot = Spot(rng.uniform(margin, size[0] - margin), rng.uniform(margin, size[1] - margin), diameter)
        if all(_apart(spot, other) for other in spots):
            spots.append(spot)
        if len(spots) == count:
            break
    return spots


def _apart(one: Spot, other: Spot) -> bool:
    return math.hypot(one.x - other.x, one.y - other.y) > REACH * (one.diameter + other.diameter) / 2


def _grid(
    rng: random.Random, size: tuple[int, int], level: float, count: int, shape: tuple[int, int]
) -> list[Spot]:
    """`count` cells of a grid of columns x rows; a single row or column need not fill the picture."""
    columns, rows = shape
    (left, width), (top, height) = _band(rng, size[0], columns, rows), _band(rng, size[1], rows, columns)
    cell_width, cell_height = width / columns, height / rows
    room = min(cell_width, cell_height) / REACH
    smallest = min(room, smallest_diameter(size, level))
    base = rng.uniform(smallest, min(room, LARGEST_SHARE * min(size)))
    variation = rng.choice((0.0, 0.3))
    spots = []
    for cell in rng.sample(range(columns * rows), count):
        diameter = min(room, max(smallest, base * rng.uniform(1 - variation, 1 + variation)))
        play = min(0.08, (min(cell_width, cell_height) - diameter * REACH) / 2 / max(cell_width, cell_height))
        spots.append(
            Spot(
                left + (cell % columns + 0.5 + rng.uniform(-play, play)) * cell_width,
                top + (cell // columns + 0.5 + rng.uniform(-play, play)) * cell_height,
                diameter,
            )
        )
    return spots


def _band(rng: random.Random, side: int, cells: int, other_cells: int) -> tuple[float, float]:
    """Start and length in pixels of the part of `side` that the cells fill."""
    if cells == 1 and other_cells > 1:
        share = rng.uniform(0.45, 1.0)
    else:
        share = rng.uniform(0.9, 1.0)
    return rng.uniform(0, 1 - share) * side, share * side
