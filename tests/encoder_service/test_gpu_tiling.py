from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from encoder_service.gpu_tiling import GpuTiler
from encoder_service.tiling import TileCutter, TilePlan, TilingOptions, plan_tiles
from tests.interpreter import DEVICE


def random_picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def assert_equal_to_pillow(tiler: GpuTiler, picture: Image.Image, plan: TilePlan, side: int) -> None:
    made = tiler.make(picture, plan).cut(range(plan.num_tiles))
    if tiler.stream is not None:
        tiler.stream.synchronize()
    expected = TileCutter(picture, plan, side).cut(range(plan.num_tiles))
    assert torch.equal(torch.stack(made).cpu(), expected), (picture.size, plan)


@pytest.mark.parametrize("size", [(31, 20), (7, 40), (16, 16)])
def test_tiles_and_thumbnail_are_those_of_the_cpu(size: tuple[int, int]) -> None:
    plan = plan_tiles(*size, TilingOptions(1, 4, True), 8)
    assert_equal_to_pillow(GpuTiler(DEVICE, 8), random_picture(*size), plan, 8)


def test_they_are_checked_against_the_pillow_that_is_installed() -> None:
    class WrongTiler(GpuTiler):
        def make(self, image: Image.Image, plan: TilePlan):
            return super().make(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), plan)

    assert GpuTiler(DEVICE, 8).equals_pillow()
    assert not WrongTiler(DEVICE, 8).equals_pillow()


def test_cut_gives_tiles_in_the_order_asked() -> None:
    tiler = GpuTiler(DEVICE, 8)
    tiles = tiler.make(random_picture(16, 8), TilePlan(2, 1, has_thumbnail=True))
    whole = torch.stack(tiles.cut(range(3)))
    assert torch.equal(torch.stack(tiles.cut([2, 0, 0])), whole[[2, 0, 0]])
    assert tiles.cut([]) == []


def test_a_picture_that_is_not_rgb_is_a_programming_error() -> None:
    with pytest.raises(AssertionError, match="L"):
        GpuTiler(DEVICE, 8).make(Image.new("L", (8, 8)), TilePlan(1, 1, False))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_300_random_sizes_equal_pillow_on_the_gpu_from_several_threads() -> None:
    dice = random.Random(11)
    sizes = [(int(2 ** dice.uniform(1, 11.5)), int(2 ** dice.uniform(1, 11.5))) for _ in range(290)]
    sizes += [(1024, 1024), (1344, 896), (448, 448), (4000, 20), (20, 4000), (2, 2), (2, 400), (5000, 3000)]
    tiler = GpuTiler(torch.device("cuda"), 448)

    def check(size: tuple[int, int]) -> None:
        plan = plan_tiles(*size, TilingOptions(1, 12, True), 448)
        assert_equal_to_pillow(tiler, random_picture(*size), plan, 448)

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(check, sizes)) == [None] * len(sizes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_picture_too_large_for_page_locked_memory_is_the_same() -> None:
    plan = TilePlan(4, 3, has_thumbnail=True)
    assert_equal_to_pillow(GpuTiler(torch.device("cuda"), 448), random_picture(3200, 2400), plan, 448)
