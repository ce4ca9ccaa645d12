"""Both passes against Pillow, on a GPU or in Triton's interpreter, on tiny pictures."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image

from encoder_service.resample_kernels import resample_into_tiles
from encoder_service.resampling import bicubic_weights
from tests.interpreter import DEVICE

SIDE = 8


def on_device(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(DEVICE)


def resized(pixels: np.ndarray, size: int, along_x: bool) -> np.ndarray:
    """One axis by Pillow: with the other one unchanged, it runs one pass."""
    target = (size, len(pixels)) if along_x else (pixels.shape[1], size)
    return np.asarray(Image.fromarray(pixels).resize(target, Image.Resampling.BICUBIC))


@pytest.mark.parametrize("along_x", [True, False])
@pytest.mark.parametrize("case", range(6))
def test_a_pass_is_pillows_bit_for_bit(case: int, along_x: bool) -> None:
    dice = random.Random(case)
    source_size, num_tiles = dice.choice((1, 3, 9, 40, 130)), dice.choice((1, 2, 3))
    other_size = 2 * SIDE
    shape = (other_size, source_size, 3) if along_x else (source_size, other_size, 3)
    pixels = (np.random.default_rng(case).integers(0, 2, shape) * 255).astype(np.uint8)
    expected = resized(pixels, num_tiles * SIDE, along_x)
    columns, rows = (num_tiles, 2) if along_x else (2, num_tiles)
    cut = expected.reshape(rows, SIDE, columns, SIDE, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, SIDE, SIDE)
    weights = bicubic_weights(source_size, num_tiles * SIDE)
    tiles = torch.full(cut.shape, 77, dtype=torch.uint8, device=DEVICE)
    source = on_device(pixels).permute(2, 0, 1)
    resample_into_tiles(source, on_device(weights.first), on_device(weights.weights), along_x, tiles, columns)
    assert np.array_equal(tiles.cpu().numpy(), cut)
