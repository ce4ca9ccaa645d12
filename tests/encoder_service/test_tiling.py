from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

from encoder_service.tiling import (
    TileCutter,
    TilePlan,
    TilingOptions,
    choose_grid,
    normalize,
    plan_tiles,
)

SIDE = 56
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def options(max_tiles: int, min_tiles: int = 1, use_thumbnail: bool = True) -> TilingOptions:
    return TilingOptions(min_tiles, max_tiles, use_thumbnail)


def random_picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def as_tile(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def random_sizes(count: int) -> list[tuple[int, int]]:
    """A third of them multiples of the tile, where several grids have exactly the picture's aspect ratio."""
    source = random.Random(7)
    sizes = [(source.randint(2, 4000), source.randint(2, 4000)) for _ in range(count * 2 // 3)]
    while len(sizes) < count:
        sizes.append((112 * source.randint(1, 24), 112 * source.randint(1, 24)))
    return sizes


@pytest.mark.parametrize("max_tiles", [4, 6, 12, 24])
def test_grids_of_2000_sizes_equal_transformers(max_tiles) -> None:
    for width, height in random_sizes(2000):
        expected = get_optimal_tiled_canvas((height, width), (448, 448), 1, max_tiles)
        assert choose_grid(width, height, options(max_tiles), 448) == tuple(expected), (width, height)


@pytest.mark.parametrize("min_tiles", [2, 5, 12])
def test_grids_with_a_lower_bound_equal_transformers(min_tiles) -> None:
    for width, height in random_sizes(300):
        expected = get_optimal_tiled_canvas((height, width), (448, 448), min_tiles, 12)
        assert choose_grid(width, height, options(12, min_tiles), 448) == tuple(expected)


@pytest.mark.parametrize(
    ("width", "height", "grid", "num_tiles"),
    [
        (800, 600, (4, 3), 13),
        (448, 448, (1, 1), 1),
        (896, 896, (2, 2), 5),
        (600, 600, (1, 1), 1),
        (1344, 1344, (3, 3), 10),
        (1920, 1080, (4, 2), 9),
        (1000, 500, (2, 1), 3),
        (300, 900, (1, 3), 4),
    ],
)
def test_worked_examples_of_the_reference(width, height, grid, num_tiles) -> None:
    plan = plan_tiles(width, height, options(12), 448)
    assert (plan.columns, plan.rows) == grid
    assert plan.num_tiles == num_tiles
    assert plan.has_thumbnail is (num_tiles > 1)


def test_a_static_checkpoint_makes_one_tile_of_any_picture() -> None:
    static = TilingOptions(min_tiles=1, max_tiles=1, use_thumbnail=False)
    assert plan_tiles(4000, 300, static, 448) == TilePlan(1, 1, has_thumbnail=False)


def test_without_thumbnail_the_grid_is_all() -> None:
    assert plan_tiles(800, 600, options(12, use_thumbnail=False), 448).num_tiles == 12


@pytest.mark.parametrize(("min_tiles", "max_tiles"), [(0, 4), (5, 4), (1, 0)])
def test_impossible_bounds_are_refused(min_tiles, max_tiles) -> None:
    with pytest.raises(ValueError, match="tiles"):
        TilingOptions(min_tiles, max_tiles, use_thumbnail=True)


@pytest.mark.parametrize("size", [(400, 300), (100, 330), (37, 29), (112, 112), (501, 97), (20, 2)])
def test_tiles_are_pillows_resize_and_crop_bit_for_bit(size) -> None:
    picture = random_picture(*size)
    plan = plan_tiles(*size, options(12), SIDE)
    canvas = picture.resize((plan.columns * SIDE, plan.rows * SIDE), Image.Resampling.BICUBIC)
    expected = []
    for tile in range(plan.columns * plan.rows):
        left, top = tile % plan.columns * SIDE, tile // plan.columns * SIDE
        expected.append(as_tile(canvas.crop((left, top, left + SIDE, top + SIDE))))
    if plan.has_thumbnail:
        expected.append(as_tile(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)))
    tiles = TileCutter(picture, plan, SIDE).cut(range(plan.num_tiles))
    assert tiles.dtype is torch.uint8 and tiles.is_contiguous()
    assert torch.equal(tiles, torch.stack(expected))


def test_a_subset_comes_in_the_order_asked_and_equals_the_whole() -> None:
    picture = random_picture(400, 300)
    plan = plan_tiles(400, 300, options(12), SIDE)
    cutter = TileCutter(picture, plan, SIDE)
    whole = cutter.cut(range(plan.num_tiles))
    wanted = [plan.num_tiles - 1, 0, 5]
    assert torch.equal(cutter.cut(wanted), whole[wanted])
    assert cutter.cut([]).shape == (0, 3, SIDE, SIDE)


def test_only_what_a_subset_needs_is_resized() -> None:
    resized: list[tuple[int, int]] = []

    class WatchedImage(Image.Image):
        def resize(self, size, *args, **kwargs):
            resized.append(size)
            return super().resize(size, *args, **kwargs)

    picture = random_picture(400, 300)
    picture.__class__ = WatchedImage
    cutter = TileCutter(picture, TilePlan(4, 3, has_thumbnail=True), SIDE)
    cutter.cut([12])
    assert resized == [(SIDE, SIDE)]
    cutter.cut([0, 1])
    cutter.cut([2, 12])
    assert resized == [(SIDE, SIDE), (4 * SIDE, 3 * SIDE)]


def test_normalize_rounds_once_to_the_dtype() -> None:
    tiles = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16).contiguous()
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    expected = (tiles.float() / 255 - mean) / std
    assert torch.equal(normalize(tiles, MEAN, STD, torch.float32), expected)
    assert torch.equal(normalize(tiles, MEAN, STD, torch.bfloat16), expected.bfloat16())
