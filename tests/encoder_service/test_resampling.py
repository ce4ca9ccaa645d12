"""The integer arithmetic of Pillow's bicubic resize, against Pillow itself."""

from __future__ import annotations

import random

import numpy as np
import PIL
import pytest
from PIL import Image

from encoder_service.resampling import PRECISION_BITS, ROUNDING, bicubic_weights, height_goes_first


def random_pixels(width: int, height: int) -> np.ndarray:
    """Half of them extremes, which overshoot and clip."""
    source = np.random.default_rng(width * 100_003 + height)
    pixels = source.integers(0, 256, (height, width, 3), dtype=np.uint8)
    extremes = source.integers(0, 2, (height, width, 3), dtype=np.uint8) * 255
    return np.where(source.random((height, width, 1)) < 0.5, pixels, extremes)


def resize_rows(pixels: np.ndarray, target_size: int) -> np.ndarray:
    """Along the first axis, in int32 as the kernels do; an overflow would wrap, and differ from Pillow."""
    weights = bicubic_weights(len(pixels), target_size)
    total = np.full((target_size, *pixels.shape[1:]), ROUNDING, dtype=np.int32)
    for tap, weight in enumerate(weights.weights):
        source = pixels[np.minimum(weights.first + tap, len(pixels) - 1)].astype(np.int32)
        total += source * weight[:, None, None]
    return np.clip(total >> PRECISION_BITS, 0, 255).astype(np.uint8)


def resize(pixels: np.ndarray, target: tuple[int, int]) -> np.ndarray:
    height, width = pixels.shape[:2]
    if height_goes_first((width, height), target, PIL.__version__):
        return resize_rows(resize_rows(pixels, target[1]).swapaxes(0, 1), target[0]).swapaxes(0, 1)
    return resize_rows(resize_rows(pixels.swapaxes(0, 1), target[0]).swapaxes(0, 1), target[1])


def sizes() -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(source, target): anything, then what tiling does, and extremes."""
    dice = random.Random(3)

    def side() -> int:
        return int(2 ** dice.uniform(0, 10))

    cases = [((side(), side()), (side(), side())) for _ in range(150)]
    for columns, rows in ((1, 1), (2, 1), (3, 3), (4, 3), (1, 12)):
        cases += [((dice.randint(2, 3000), dice.randint(2, 600)), (448 * columns, 448 * rows))]
    cases += [
        ((2, 400), (448, 5376)),
        ((4000, 20), (5376, 448)),
        ((448, 448), (448, 448)),
        ((1, 1), (448, 448)),
    ]
    return cases


@pytest.mark.parametrize(("source", "target"), sizes())
def test_pixels_are_pillows_bit_for_bit(source: tuple[int, int], target: tuple[int, int]) -> None:
    pixels = random_pixels(*source)
    expected = np.asarray(Image.fromarray(pixels).resize(target, Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(resize(pixels, target), expected)


def test_32_bits_hold_every_sum() -> None:
    """`bicubic_weights` asserts it for the sizes it is asked for; these are the most extreme ratios."""
    for source in (1, 2, 3, 5, 7, 447, 448, 449, 1000, 16_384):
        for target in (448, 449, 896, 5376, 448 * 40):
            weights = bicubic_weights(source, target)
            assert np.abs(weights.weights.astype(np.int64)).sum(0).max() * 255 + ROUNDING < 1 << 31
            assert (weights.first >= 0).all() and (weights.first < source).all()


@pytest.mark.parametrize(
    ("ratio", "target_height"), [(99, 40), (100, 40), (101, 40), (300, 448), (300, 7000)]
)
def test_very_tall_pictures_are_pillows_bit_for_bit(ratio: int, target_height: int) -> None:
    """Pillow 12 changes the order of the passes above 100."""
    pixels = random_pixels(13, 13 * ratio)
    expected = np.asarray(Image.fromarray(pixels).resize((448, target_height), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(resize(pixels, (448, target_height)), expected)
