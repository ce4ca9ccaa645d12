"""Which tiles a picture is cut into, from its size alone, and their pixels, equal to Pillow's bit for bit.

Knows nothing about file formats or the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Protocol

import numpy as np
import torch
from PIL import Image


@dataclass(frozen=True)
class TilingOptions:
    """Bounds on the tiles of the grid (the thumbnail is not counted). A static checkpoint is 1 to 1."""

    min_tiles: int
    max_tiles: int
    use_thumbnail: bool

    def __post_init__(self) -> None:
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise ValueError(f"tiles must be 1 <= min {self.min_tiles} <= max {self.max_tiles}")


@dataclass(frozen=True)
class TilePlan:
    """Tiles of one picture: the grid row by row, then the thumbnail."""

    columns: int
    rows: int
    has_thumbnail: bool

    @property
    def num_tiles(self) -> int:
        return self.columns * self.rows + self.has_thumbnail


def choose_grid(width: int, height: int, options: TilingOptions, image_size: int) -> tuple[int, int]:
    """(columns, rows) of the grid whose aspect ratio is nearest to the picture's.

    Among equal distances a larger grid wins as long as the picture has more than half of the grid's pixels.
    Source: `find_closest_aspect_ratio` and `dynamic_preprocess` of InternVL; comparisons of Python floats.
    """
    aspect_ratio = width / height
    best, best_distance = (1, 1), float("inf")
    for columns, rows in _grids(options.min_tiles, options.max_tiles):
        distance = abs(aspect_ratio - columns / rows)
        fills_grid = width * height > 0.5 * image_size * image_size * columns * rows
        if distance < best_distance or (distance == best_distance and fills_grid):
            best, best_distance = (columns, rows), distance
    return best


def plan_tiles(width: int, height: int, options: TilingOptions, image_size: int) -> TilePlan:
    """Layout of a picture of that many pixels; a single tile needs no thumbnail."""
    columns, rows = choose_grid(width, height, options, image_size)
    return TilePlan(columns, rows, options.use_thumbnail and columns * rows > 1)


class Cutter(Protocol):
    """Tiles of one picture on demand, on whichever device they are made."""

    def cut(self, tiles: Sequence[int]) -> Iterable[torch.Tensor]:
        """The tiles of these indices, in this order; uint8 [3, image_size, image_size] each."""


class PartsCutter:
    """Tiles of several pictures, numbered one picture behind the other."""

    def __init__(self, cutters: Sequence[Cutter], num_tiles: Sequence[int]) -> None:
        self._places = [
            (cutter, tile) for cutter, count in zip(cutters, num_tiles, strict=True) for tile in range(count)
        ]

    def cut(self, tiles: Sequence[int]) -> list[torch.Tensor]:
        """The tiles of these indices, in this order; uint8 [3, image_size, image_size] each."""
        places = [self._places[tile] for tile in tiles]
        return [pixels for cutter, tile in places for pixels in cutter.cut([tile])]


class TileCutter:
    """Cuts the tiles of one RGB picture on demand; the resized canvas is made once, and only if needed."""

    def __init__(self, image: Image.Image, plan: TilePlan, image_size: int) -> None:
        assert image.mode == "RGB", image.mode  # Pillow resizes palettes and alpha differently
        self._image = image
        self._plan = plan
        self._image_size = image_size

    def cut(self, tiles: Sequence[int]) -> torch.Tensor:
        """The tiles of these indices, in this order; uint8 [len(tiles), 3, image_size, image_size]."""
        side = self._image_size
        pixels = torch.empty((len(tiles), 3, side, side), dtype=torch.uint8)
        target = pixels.numpy()
        for position, tile in enumerate(tiles):
            target[position] = self._tile(tile).transpose(2, 0, 1)
        return pixels

    def _tile(self, tile: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        """[image_size, image_size, 3]"""
        assert 0 <= tile < self._plan.num_tiles, tile
        if tile == self._plan.columns * self._plan.rows:
            return self._thumbnail
        row, column = divmod(tile, self._plan.columns)
        side = self._image_size
        return self._canvas[row * side : (row + 1) * side, column * side : (column + 1) * side]

    # The whole canvas for any of its tiles: Pillow's resize of one tile's box gives other pixels (measured:
    # in 41 of 60 random pictures, by up to 27 of 255).
    @cached_property
    def _canvas(self) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        size = (self._plan.columns * self._image_size, self._plan.rows * self._image_size)
        return np.asarray(self._image.resize(size, Image.Resampling.BICUBIC))

    @cached_property
    def _thumbnail(self) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        size = (self._image_size, self._image_size)
        return np.asarray(self._image.resize(size, Image.Resampling.BICUBIC))


def normalize(
    tiles: torch.Tensor,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    dtype: torch.dtype,
) -> torch.Tensor:
    """(tiles / 255 - mean) / std on the tiles' device, [num_tiles, 3, S, S] in `dtype`.

    Computed in fp32 and rounded once, as the reference does.
    """
    shape = (1, 3, 1, 1)
    means = torch.tensor(mean, device=tiles.device).view(shape)
    deviations = torch.tensor(std, device=tiles.device).view(shape)
    return tiles.float().div_(255).sub_(means).div_(deviations).to(dtype)


@cache
def _grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """Every (columns, rows) with that many tiles, smaller ones first; few pairs of bounds are ever used."""
    grids = [
        (columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // columns + 1)
        if columns * rows >= min_tiles
    ]
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))
