"""How products of few rows are computed: as measured where a table has the shape, else by rule."""

from __future__ import annotations

from llm_service.kernels import table_bf16, table_float8
from llm_service.kernels.linear_config import (
    COUNTERS,
    MAX_GEMV_ROWS,
    MIN_DOT_ROWS,
    NUM_SMS,
    Config,
    GemvConfig,
    TileConfig,
    row_class,
)


def configuration(rows: int, n: int, k: int) -> Config | None:
    """How to multiply `rows` rows of x with W [n, k]; None: by cuBLAS."""
    key = (row_class(rows), n, k)
    if key in table_bf16.TABLE:
        return table_bf16.TABLE[key]
    return _gemv_rule(rows, n) if rows <= MAX_GEMV_ROWS else _tile_rule(key[0], n, k)


def float8_configuration(rows: int, n: int, k: int) -> Config | None:
    """How to multiply `rows` rows of x with W [n, k] in float8; None: by torch._scaled_mm, which rounds x."""
    key = (row_class(rows), n, k)
    if key in table_float8.TABLE:
        return table_float8.TABLE[key]
    # More rows than two have a multiply-add each for every element: they are for the tensor cores.
    return _float8_gemv_rule(n, k) if rows <= 2 else _float8_tile_rule(max(MIN_DOT_ROWS, key[0]), n, k)


def _gemv_rule(rows: int, n: int) -> GemvConfig:
    """Several CTAs on each SM, all resident at once where N is small."""
    if rows <= 2 and n >= 64 * NUM_SMS:
        return GemvConfig(block_n=8, block_k=512, num_warps=2)
    return GemvConfig(block_n=4 if n >= 16 * NUM_SMS else 2, block_k=1024, num_warps=4)


def _tile_rule(block_m: int, n: int, k: int) -> TileConfig:
    """Two CTAs on each SM; K is split where N has too few tiles for that."""
    wide = block_m == 64 and n >= 128 * NUM_SMS
    block_n, block_k = (128, 64) if wide else (64, 128)
    tiles, chunks = -(-n // block_n), -(-k // block_k)
    split_k = 1 if tiles > COUNTERS else max(1, min(2 * NUM_SMS // tiles, 8, chunks // 4))
    return TileConfig(block_n, block_k, 8 if wide else 4, 4 if block_m < 64 or wide else 3, split_k)


def _float8_gemv_rule(n: int, k: int) -> GemvConfig:
    """About as many bytes in flight as in the best of 16 bits; short rows have few columns to read ahead."""
    if k > 8192:
        return GemvConfig(block_n=4, block_k=1024, num_warps=4)
    return GemvConfig(block_n=4 if n >= 64 * NUM_SMS else 2, block_k=512, num_warps=2)


def _float8_tile_rule(block_m: int, n: int, k: int) -> TileConfig:
    """Several CTAs on each SM: one's tensor cores wait for its conversions, which the others fill."""
    block_n, block_k = 64, 128
    per_sm = 4 if block_m == MIN_DOT_ROWS else 2  # the more rows, the more parts of sums there are to add up
    tiles, chunks = -(-n // block_n), -(-k // block_k)
    split_k = 1 if tiles > COUNTERS else max(1, min(per_sm * NUM_SMS // tiles, 8, chunks // 4))
    return TileConfig(block_n, block_k, 4, 4 if block_m < 64 else 3, split_k)
