"""Triton kernels for what lies between the tower's matrix products: one pass over memory each.

Imports Triton: imported only where there is a GPU (or Triton's interpreter).  All compute in fp32 and round
where the modules that they stand for do, except that a scaled branch is added before it is rounded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_PATCH_BLOCK = 1024


@triton.jit
def _patchify(  # type: ignore[no-untyped-def]
    tiles,  # uint8 [num_tiles, 3, SIDE, SIDE]
    normalized,  # [3, 256]: what each value of each channel becomes
    patches,  # [num_tiles * (SIDE / PATCH)**2, WIDTH]
    num_elements,
    SIDE: tl.constexpr,
    PATCH: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < num_elements
    patch = index // WIDTH
    position = (index % WIDTH).to(tl.int32)
    channel = position // (PATCH * PATCH)
    in_patch = position % (PATCH * PATCH)
    GRID: tl.constexpr = SIDE // PATCH
    tile = patch // (GRID * GRID)
    cell = (patch % (GRID * GRID)).to(tl.int32)
    y = cell // GRID * PATCH + in_patch // PATCH
    x = cell % GRID * PATCH + in_patch % PATCH
    is_pixel = inside & (channel < 3)  # the rest of WIDTH is zero
    value = tl.load(tiles + ((tile * 3 + channel) * SIDE + y) * SIDE + x, mask=is_pixel, other=0)
    pixel = tl.load(normalized + channel * 256 + value.to(tl.int32), mask=is_pixel, other=0.0)
    tl.store(patches + index, pixel, mask=inside)


@triton.jit
def _add_and_normalize(  # type: ignore[no-untyped-def]
    hidden,  # [num_rows, SIZE]; written where there is a branch
    branch,  # [num_rows, SIZE]
    scale,  # [SIZE]
    weight,  # [SIZE]
    bias,  # [SIZE]
    normed,  # [num_rows, SIZE]; written
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    IS_RMS: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * SIZE
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    row = tl.load(hidden + start + column, mask=inside, other=0.0).to(tl.float32)
    dtype = hidden.dtype.element_ty
    if HAS_BRANCH:
        added = tl.load(branch + start + column, mask=inside, other=0.0).to(tl.float32)
        row += added * tl.load(scale + column, mask=inside, other=0.0).to(tl.float32)
        rounded = row.to(dtype)
        tl.store(hidden + start + column, rounded, mask=inside)
        row = rounded.to(tl.float32)
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if IS_RMS:
        row *= tl.rsqrt(tl.sum(row * row) / SIZE + eps)
        result = row.to(dtype).to(tl.float32) * gain
    else:
        row = tl.where(inside, row - tl.sum(row) / SIZE, 0.0)
        result = row * tl.rsqrt(tl.sum(row * row) / SIZE + eps) * gain
        result += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + start + column, result.to(dtype), mask=inside)


@triton.jit
def _normalize_query_and_key(  # type: ignore[no-untyped-def]
    qkv,  # [num_rows, 3 * SIZE]; the first two thirds are written
    query_weight,  # [SIZE]
    key_weight,  # [SIZE]
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    is_key = tl.program_id(1)
    start = tl.program_id(0).to(tl.int64) * 3 * SIZE + is_key * SIZE
    column = tl.arange(0, BLOCK)
    inside = column < SIZE
    row = tl.load(qkv + start + column, mask=inside, other=0.0).to(tl.float32)
    row *= tl.rsqrt(tl.sum(row * row) / SIZE + eps)
    if is_key == 0:
        gain = tl.load(query_weight + column, mask=inside, other=0.0)
    else:
        gain = tl.load(key_weight + column, mask=inside, other=0.0)
    dtype = qkv.dtype.element_ty
    result = row.to(dtype).to(tl.float32) * gain.to(tl.float32)
    tl.store(qkv + start + column, result.to(dtype), mask=inside)


def patchify(tiles: torch.Tensor, normalized: torch.Tensor, patch_size: int, width: int) -> torch.Tensor:
    """Normalised pixels, patch by patch.

    Args:
        tiles: uint8 [num_tiles, 3, side, side], contiguous.
        normalized: [3, 256], what each value of each channel becomes.
        width: At least 3 * patch_size**2; the rest of each row is zero.

    Returns:
        [num_tiles * (side / patch_size)**2, width] in `normalized`'s dtype; within a row (channel, y, x).
    """
    num_tiles, _, _, side = tiles.shape
    shape = (num_tiles * (side // patch_size) ** 2, width)
    patches = torch.empty(shape, dtype=normalized.dtype, device=tiles.device)
    grid = (triton.cdiv(patches.numel(), _PATCH_BLOCK),)
    _patchify[grid](
        tiles,
        normalized,
        patches,
        patches.numel(),
        SIDE=side,
        PATCH=patch_size,
        WIDTH=width,
        BLOCK=_PATCH_BLOCK,
    )
    return patches


def add_and_normalize(
    hidden: torch.Tensor,
    branch: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """hidden += branch * scale, in place; then LayerNorm of it, or RMSNorm where there is no bias.

    Args:
        hidden: [num_rows, size], contiguous; so is `branch`, which comes with its scale [size], or neither.

    Returns:
        [num_rows, size]
    """
    num_rows, size = hidden.shape
    assert hidden.is_contiguous() and (branch is None or branch.is_contiguous())
    normed = torch.empty_like(hidden)
    block = triton.next_power_of_2(size)
    _add_and_normalize[(num_rows,)](
        hidden,
        hidden if branch is None else branch,
        weight if scale is None else scale,
        weight,
        weight if bias is None else bias,
        normed,
        eps,
        SIZE=size,
        BLOCK=block,
        HAS_BRANCH=branch is not None,
        IS_RMS=bias is None,
        num_warps=_num_warps(block),
    )
    return normed


def normalize_query_and_key(
    qkv: torch.Tensor, query_weight: torch.Tensor, key_weight: torch.Tensor, eps: float
) -> None:
    """RMSNorm of the whole q and of the whole k, in place; qkv is [num_rows, 3 * size], contiguous."""
    num_rows, size = qkv.shape[0], query_weight.shape[0]
    assert qkv.is_contiguous()
    block = triton.next_power_of_2(size)
    _normalize_query_and_key[(num_rows, 2)](
        qkv, query_weight, key_weight, eps, SIZE=size, BLOCK=block, num_warps=_num_warps(block)
    )


def _num_warps(block: int) -> int:
    """8 elements a thread: 16 bytes a load."""
    return min(max(block // 256, 1), 16)
