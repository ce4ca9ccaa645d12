"""Ways to compute a product of few rows, and those worth measuring for a shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

MAX_GEMV_ROWS = 4
MAX_TILED_ROWS = 64
MIN_DOT_ROWS = 16
NUM_SMS = 132  # of the H100 and H200 that the tables are for
SHARED_MEMORY_BYTES = 200 << 10  # of one CTA, with some to spare
COUNTERS = 4096  # output tiles of one split product


@dataclass(frozen=True)
class GemvConfig:
    """A CTA reads `block_n` rows of W, `block_k` columns at a time, and the next columns ahead."""

    block_n: int
    block_k: int  # 32 * vector a warp
    num_warps: int
    # Consecutive columns of W that a thread loads.  At 8, x and W lie in registers alike: no exchange;
    # at 16, of float8 only, W comes in the widest loads that there are.
    vector: int = 8


@dataclass(frozen=True)
class TileConfig:
    """A CTA makes `block_n` columns of y from one of `split_k` parts of the columns of W."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int = 1


Config = GemvConfig | TileConfig
# (row class, N, K) -> configuration, None where the library (cuBLAS, or torch._scaled_mm) is faster.
Table = dict[tuple[int, int, int], Config | None]


def row_class(rows: int) -> int:
    """1, 2, 4, 16, 32 or 64: numbers of rows that share a configuration."""
    assert 1 <= rows <= MAX_TILED_ROWS
    if rows > MAX_GEMV_ROWS:
        return 16 if rows <= 16 else 32 if rows <= 32 else 64
    return rows if rows <= 2 else 4


def candidates(rows: int, n: int, k: int) -> Iterator[Config]:
    """For W in 16 bits."""
    if rows <= MAX_GEMV_ROWS:
        for num_warps, block_n in (
            *((1, 8), (2, 2), (2, 4), (2, 8), (4, 1), (4, 2), (4, 4), (4, 8), (8, 2), (8, 4)),
        ):
            if n // block_n >= 2 * NUM_SMS:
                yield GemvConfig(block_n, 256 * num_warps, num_warps)
    if rows > 1:
        blocks = ((64, 128, 4), (64, 256, 4), (128, 64, 8), (128, 128, 8), (128, 64, 4))
        yield from _tile_candidates(max(MIN_DOT_ROWS, row_class(rows)), n, k, 2, blocks, (3, 4, 5))


def float8_candidates(rows: int, n: int, k: int) -> Iterator[Config]:
    """For W in float8: few, so that all are compiled and measured within a minute."""
    if rows <= 2:
        for num_warps, block_n in ((1, 4), (1, 8), (2, 2), (2, 4), (2, 8), (4, 2), (4, 4), (4, 8)):
            if n // block_n >= 2 * NUM_SMS:
                yield GemvConfig(block_n, 256 * num_warps, num_warps)
        yield GemvConfig(1, 512, 1, 16)
    if rows > 1:
        blocks = ((64, 128, 4), (64, 256, 4), (128, 128, 8))
        yield from _tile_candidates(max(MIN_DOT_ROWS, row_class(rows)), n, k, 1, blocks, (3, 4))


def _tile_candidates(
    block_m: int,
    n: int,
    k: int,
    weight_bytes: int,
    blocks: tuple[tuple[int, int, int], ...],
    stages: tuple[int, ...],
) -> Iterator[TileConfig]:
    """Enough CTAs, none of them with more than one SM's shared memory."""
    for block_n, block_k, num_warps in blocks:
        tiles, chunks = -(-n // block_n), -(-k // block_k)
        for num_stages in stages:
            if num_stages * (weight_bytes * block_n + 2 * block_m) * block_k > SHARED_MEMORY_BYTES:
                continue
            for split_k in _splits(tiles, chunks):
                yield TileConfig(block_n, block_k, num_warps, num_stages, split_k)


def _splits(tiles: int, chunks: int) -> tuple[int, ...]:
    """1 where the tiles alone fill the GPU; else about one and about two CTAs an SM."""
    if tiles >= 2 * NUM_SMS:
        return (1,)
    wanted = {max(1, per_sm * NUM_SMS // tiles) for per_sm in (1, 2)}
    return tuple(sorted(split for split in wanted if split <= chunks))
