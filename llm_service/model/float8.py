"""Matrices in float8 (e4m3) with one fp32 scale a row: the matrix is `values * scale[:, None]`.

Knows neither layers nor which kernels multiply by them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

FLOAT8 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
# Rows and columns that the GPU's float8 products take come in multiples of this (torch._scaled_mm).
MULTIPLE = 16
SMALLEST_AMAX = 1e-12  # keeps the scale of a row of zeros above 0
ROWS_AT_ONCE = 4096  # bounds the fp32 copies that are made on the way


@dataclass(frozen=True)
class Float8Rows:
    """Rows of activations, rounded: each stands for its scale times its values."""

    values: torch.Tensor  # [num_rows, size] float8
    scale: torch.Tensor  # [num_rows] fp32


def quantize_rows(source: torch.Tensor, values: torch.Tensor, scale: torch.Tensor) -> None:
    """Fill `values` [n, k] and `scale` [n] from `source` [n, k] of any float dtype, on any device.

    A row's largest element becomes 448, the others are rounded to nearest: each is off by a sixteenth of
    itself at most, or by 2**-10 of the scale where it is small.
    """
    assert values.dtype == FLOAT8 and values.shape == source.shape
    for start in range(0, len(source), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        part = source[rows].to(values.device).float()
        part_scale = part.abs().amax(dim=1).clamp_(min=SMALLEST_AMAX) / LARGEST
        scale[rows] = part_scale
        values[rows] = part / part_scale[:, None]


def dequantize(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[n, k] in `dtype`, rounded once."""
    return (values.float() * scale[:, None]).to(dtype)
