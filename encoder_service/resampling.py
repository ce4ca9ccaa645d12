"""Pillow's bicubic resize as integers: which source pixels make an output pixel, and with what weights.

Knows nothing about devices.  Source: `precompute_coeffs` and `normalize_coeffs_8bpc` of Pillow's Resample.c.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# A weight of 1 is 1 << PRECISION_BITS: 8 bits for the result, 2 for overshoot and sign, as Pillow has it.
PRECISION_BITS = 32 - 8 - 2
# Added before the shift by PRECISION_BITS, so that it rounds to the nearest.
ROUNDING = 1 << (PRECISION_BITS - 1)
_SUPPORT = 2.0  # of the bicubic filter, in source pixels of an enlarged picture
_SHARPNESS = -0.5


@dataclass(frozen=True, eq=False)
class ResampleWeights:
    """One axis of a resize: output i is sum(weights[:, i] * source[first[i] :]), rounded and clipped."""

    first: NDArray[np.int32]  # [target_size]
    weights: NDArray[np.int32]  # [num_taps, target_size]; zero for pixels beyond the last


def bicubic_weights(source_size: int, target_size: int) -> ResampleWeights:
    """Weights of `Image.resize(..., BICUBIC)` along one axis, in Pillow's order of operations."""
    scale = source_size / target_size
    filter_scale = max(scale, 1.0)
    support = _SUPPORT * filter_scale
    num_taps = math.ceil(support) * 2 + 1
    centers = (np.arange(target_size) + 0.5) * scale
    first = np.maximum((centers - support + 0.5).astype(np.int64), 0)
    end = np.minimum((centers + support + 0.5).astype(np.int64), source_size)
    counts = end - first
    weights = np.zeros((num_taps, target_size))
    total = np.zeros(target_size)
    for tap in range(num_taps):  # one after the other: the sum's order decides its last bit
        weight = _bicubic((tap + first - centers + 0.5) * (1.0 / filter_scale))
        weights[tap] = np.where(tap < counts, weight, 0.0)
        total += weights[tap]
    weights /= np.where(total == 0.0, 1.0, total)
    fixed = weights * (1 << PRECISION_BITS)
    fixed = np.trunc(fixed + np.where(fixed < 0, -0.5, 0.5)).astype(np.int64)
    # int32 accumulators: the partial sums of 255 * weights must not leave their range.
    assert 255 * int(np.abs(fixed).sum(0).max()) + ROUNDING < 1 << 31, (source_size, target_size)
    return ResampleWeights(first.astype(np.int32), fixed.astype(np.int32))


def height_goes_first(source: tuple[int, int], target: tuple[int, int], pillow: str) -> bool:
    """Which pass is the first in this version of Pillow: rounding between them makes it matter.

    Sizes are (width, height).  Source: Pillow's pull requests 9524 (12.2) and 9549 (13.0); the condition of
    the latter was read off 1500 random sizes.
    """
    if target[1] >= source[1]:
        return False
    if int(pillow.partition(".")[0]) < 13:
        return source[1] > 100 * source[0]
    return source[1] - target[1] > 2 * (source[0] - target[0])


def _bicubic(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    a, x = _SHARPNESS, np.abs(distance)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
