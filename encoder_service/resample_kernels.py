"""Triton kernel of one pass of Pillow's 8-bit resize: integers only, so the pixels are Pillow's.

Imports Triton: imported only where there is a GPU (or Triton's interpreter).  Knows nothing about files or
the model.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Output pixels of one row that a program makes.
_BLOCK = 256


# Sizes differ from picture to picture: specialising on them would compile while requests wait.
@triton.jit(
    do_not_specialize=[
        "channel_stride",
        "row_stride",
        "column_stride",
        "source_size",
        "target_width",
        "target_size",
        "num_taps",
        "side_x",
        "side_y",
        "columns",
    ]
)
def _resample(  # type: ignore[no-untyped-def]
    source,  # uint8 [3, height, width] by its strides
    tiles,  # uint8 [num_tiles, 3, side_y, side_x]
    first,  # int32 [target_size]
    weights,  # int32 [num_taps, target_size]
    channel_stride,
    row_stride,
    column_stride,
    source_size,  # along the axis that is resized, as target_size
    target_width,
    target_size,
    num_taps,
    side_x,
    side_y,
    columns,
    ALONG_X: tl.constexpr,
    BLOCK: tl.constexpr,
):
    x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.program_id(1)
    channel = tl.program_id(2)
    inside = x < target_width
    plane = source + channel.to(tl.int64) * channel_stride
    total = tl.full([BLOCK], 1 << 21, tl.int32)  # ROUNDING
    if ALONG_X:
        start = tl.load(first + x, mask=inside, other=0)
        row = plane + y.to(tl.int64) * row_stride
        for tap in range(num_taps):
            weight = tl.load(weights + tap * target_size + x, mask=inside, other=0)
            at = tl.minimum(start + tap, source_size - 1)  # beyond the last pixel the weight is 0
            total += tl.load(row + at * column_stride, mask=inside, other=0).to(tl.int32) * weight
    else:
        start = tl.load(first + y)
        column = plane + x * column_stride
        for tap in range(num_taps):
            weight = tl.load(weights + tap * target_size + y)
            at = tl.minimum(start + tap, source_size - 1).to(tl.int64)
            total += tl.load(column + at * row_stride, mask=inside, other=0).to(tl.int32) * weight
    pixel = tl.minimum(tl.maximum(total >> 22, 0), 255)  # Pillow's clip8; 22 is PRECISION_BITS
    tile = y // side_y * columns + x // side_x
    out = tiles + ((tile * 3 + channel) * side_y + y % side_y) * side_x.to(tl.int64) + x % side_x
    tl.store(out, pixel.to(tl.uint8), mask=inside)


def resample_into_tiles(
    source: torch.Tensor,
    first: torch.Tensor,
    weights: torch.Tensor,
    along_x: bool,
    tiles: torch.Tensor,
    columns: int,
) -> None:
    """One pass, along one axis; the result is cut into tiles in row-major order.

    Args:
        source: uint8 [3, height, width], of any strides.
        first: int32 [target_size], and `weights` int32 [num_taps, target_size]: of `bicubic_weights`.
        tiles: uint8 [columns * rows, 3, side_y, side_x], contiguous; written.  One tile is the whole picture.
    """
    num_tiles, _, side_y, side_x = tiles.shape
    width, height = columns * side_x, num_tiles // columns * side_y
    num_taps, target_size = weights.shape
    assert target_size == (width if along_x else height) and tiles.is_contiguous()
    _resample[(triton.cdiv(width, _BLOCK), height, 3)](
        source,
        tiles,
        first,
        weights,
        *source.stride(),
        source.shape[2 if along_x else 1],
        width,
        target_size,
        num_taps,
        side_x,
        side_y,
        columns,
        ALONG_X=along_x,
        BLOCK=_BLOCK,
    )
