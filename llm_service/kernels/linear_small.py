"""y = x W^T + b for few rows of x, where the time is that of reading W once: Triton, for CUDA only.

Up to 4 rows, multiply-adds on whole rows of W (GEMV); up to 64, tensor cores with W as the left operand.
W has x's 16 bits, or is in float8 with one scale a row: then half as much is read, and x stays exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

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
    # Consecutive columns of W that a thread loads. At 8, x and W lie in registers alike and need no exchange;
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
# (row class, N, K) -> configuration, None where cuBLAS is faster; other shapes go by rule.
# Made by `python -m llm_service.kernels.timing --tune` on an H200 (torch 2.11, Triton 3.6).
TABLE: dict[tuple[int, int, int], Config | None] = {
    (1, 4608, 3584): GemvConfig(block_n=2, block_k=512, num_warps=2),  # 9.5 us, cuBLAS 10.7
    (2, 4608, 3584): None,  # 11.1 us, cuBLAS 11.1
    (4, 4608, 3584): None,  # 11.1 us, cuBLAS 11.1
    (16, 4608, 3584): TileConfig(
        block_n=64, block_k=256, num_warps=4, num_stages=4, split_k=1
    ),  # 10.7 us, cuBLAS 11.1
    (32, 4608, 3584): None,  # 11.2 us, cuBLAS 11.2
    (64, 4608, 3584): None,  # 11.9 us, cuBLAS 11.9
    (1, 3584, 3584): GemvConfig(block_n=2, block_k=512, num_warps=2),  # 8.2 us, cuBLAS 10.8
    (2, 3584, 3584): TileConfig(
        block_n=128, block_k=64, num_warps=4, num_stages=5, split_k=4
    ),  # 9.9 us, cuBLAS 10.8
    (4, 3584, 3584): TileConfig(
        block_n=128, block_k=64, num_warps=4, num_stages=5, split_k=4
    ),  # 9.9 us, cuBLAS 10.8
    (16, 3584, 3584): TileConfig(
        block_n=64, block_k=128, num_warps=4, num_stages=5, split_k=2
    ),  # 9.3 us, cuBLAS 10.9
    (32, 3584, 3584): TileConfig(
        block_n=64, block_k=128, num_warps=4, num_stages=5, split_k=2
    ),  # 9.7 us, cuBLAS 11.1
    (64, 3584, 3584): None,  # 9.8 us, cuBLAS 9.8
    (1, 37888, 3584): GemvConfig(block_n=2, block_k=512, num_warps=2),  # 60.9 us, cuBLAS 69.1
    (2, 37888, 3584): TileConfig(
        block_n=128, block_k=64, num_warps=8, num_stages=3, split_k=1
    ),  # 63.5 us, cuBLAS 68.8
    (4, 37888, 3584): TileConfig(
        block_n=128, block_k=64, num_warps=8, num_stages=3, split_k=1
    ),  # 63.7 us, cuBLAS 69.5
    (16, 37888, 3584): TileConfig(
        block_n=64, block_k=128, num_warps=4, num_stages=3, split_k=1
    ),  # 64.0 us, cuBLAS 70.4
    (32, 37888, 3584): TileConfig(
        block_n=128, block_k=64, num_warps=4, num_stages=3, split_k=1
    ),  # 65.8 us, cuBLAS 71.0
    (64, 37888, 3584): TileConfig(
        block_n=128, block_k=64, num_warps=4, num_stages=3, split_k=1
    ),  # 69.0 us, cuBLAS 71.3
    (1, 3584, 18944): GemvConfig(block_n=4, block_k=1024, num_warps=4),  # 32.8 us, cuBLAS 38.8
    (2, 3584, 18944): GemvConfig(block_n=4, block_k=1024, num_warps=4),  # 34.2 us, cuBLAS 37.6
    (4, 3584, 18944): TileConfig(
        block_n=64, block_k=256, num_warps=4, num_stages=4, split_k=2
    ),  # 35.2 us, cuBLAS 38.1
    (16, 3584, 18944): TileConfig(
        block_n=64, block_k=256, num_warps=4, num_stages=4, split_k=2
    ),  # 34.9 us, cuBLAS 38.0
    (32, 3584, 18944): TileConfig(
        block_n=64, block_k=256, num_warps=4, num_stages=4, split_k=2
    ),  # 35.9 us, cuBLAS 38.5
    (64, 3584, 18944): TileConfig(
        block_n=64, block_k=128, num_warps=4, num_stages=5, split_k=2
    ),  # 37.7 us, cuBLAS 41.8
    (1, 151674, 3584): GemvConfig(block_n=2, block_k=512, num_warps=2),  # 233.9 us, cuBLAS 340.6
    (2, 151674, 3584): GemvConfig(block_n=2, block_k=512, num_warps=2),  # 238.6 us, cuBLAS 405.2
    (4, 151674, 3584): TileConfig(
        block_n=128, block_k=128, num_warps=8, num_stages=5, split_k=1
    ),  # 240.9 us, cuBLAS 413.2
    (16, 151674, 3584): TileConfig(
        block_n=64, block_k=128, num_warps=4, num_stages=3, split_k=1
    ),  # 243.6 us, cuBLAS 393.5
    (32, 151674, 3584): TileConfig(
        block_n=128, block_k=64, num_warps=4, num_stages=3, split_k=1
    ),  # 247.4 us, cuBLAS 389.8
    (64, 151674, 3584): TileConfig(
        block_n=128, block_k=64, num_warps=4, num_stages=3, split_k=1
    ),  # 260.9 us, cuBLAS 415.9
}


def row_class(rows: int) -> int:
    """1, 2, 4, 16, 32 or 64: numbers of rows that share a configuration."""
    assert 1 <= rows <= MAX_TILED_ROWS
    if rows > MAX_GEMV_ROWS:
        return 16 if rows <= 16 else 32 if rows <= 32 else 64
    return rows if rows <= 2 else 4


# The same for W in float8, by `--tune --weights fp8`; never None, for then x would have to be in float8 too.
FLOAT8_TABLE: dict[tuple[int, int, int], Config] = {}


def configuration(rows: int, n: int, k: int) -> Config | None:
    """How to multiply `rows` rows of x with W [n, k]; None: by cuBLAS."""
    key = (row_class(rows), n, k)
    if key in TABLE:
        return TABLE[key]
    return _gemv_rule(rows, n) if rows <= MAX_GEMV_ROWS else _tile_rule(key[0], n, k)


def float8_configuration(rows: int, n: int, k: int) -> Config:
    """How to multiply `rows` rows of x with W [n, k] in float8."""
    key = (row_class(rows), n, k)
    if key in FLOAT8_TABLE:
        return FLOAT8_TABLE[key]
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
    tiles, chunks = triton.cdiv(n, block_n), triton.cdiv(k, block_k)
    split_k = 1 if tiles > COUNTERS else max(1, min(2 * NUM_SMS // tiles, 8, chunks // 4))
    return TileConfig(block_n, block_k, 8 if wide else 4, 4 if block_m < 64 or wide else 3, split_k)


def _float8_gemv_rule(n: int, k: int) -> GemvConfig:
    """As many bytes in flight as in the best of 16 bits; short rows have few columns to read ahead."""
    if k > 8192:
        return GemvConfig(block_n=4, block_k=1024, num_warps=4)
    return GemvConfig(block_n=4 if n >= 64 * NUM_SMS else 2, block_k=512, num_warps=2)


def _float8_tile_rule(block_m: int, n: int, k: int) -> TileConfig:
    """As _tile_rule, with blocks of W of as many bytes."""
    wide = block_m == 64 and n >= 128 * NUM_SMS
    block_n, block_k = (128, 128) if wide else (64, 256 if block_m < 64 else 128)
    tiles, chunks = triton.cdiv(n, block_n), triton.cdiv(k, block_k)
    split_k = 1 if tiles > COUNTERS else max(1, min(2 * NUM_SMS // tiles, 8, chunks // 4))
    return TileConfig(block_n, block_k, 8 if wide else 4, 4 if block_m == 16 else 3, split_k)


@triton.jit
def _gemv_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [M, K]
    weight_ptr,  # [N, K]
    scale_ptr,  # [N] fp32, of a float8 W
    bias_ptr,  # [N]
    y_ptr,  # [M, N]
    N,
    M: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VECTOR: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    CHUNKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    EVEN: tl.constexpr = K % BLOCK_K == 0
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # Says how many columns a thread takes at once; of float8 the compiler would take 16, of x 8.
    columns = tl.max_contiguous(tl.arange(0, BLOCK_K), VECTOR)[None, :]
    # Rows past the end read the last one: no masks on the loads, and the stores are masked.
    rows = weight_ptr + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if EVEN:
        weight = tl.load(rows + columns, eviction_policy="evict_first")
    else:
        weight = tl.load(rows + columns, mask=columns < K, other=0.0, eviction_policy="evict_first")
    # Weights never change, so their first columns come while the kernel before still writes x.
    if PDL:
        tl.extra.cuda.gdc_wait()
    # One accumulator a row of x, spelt out: Triton has no arrays of tensors.
    sum0 = tl.zeros((BLOCK_N, BLOCK_K // VECTOR), tl.float32)
    sum1 = sum0
    sum2 = sum0
    sum3 = sum0
    for chunk in range(CHUNKS):
        k = chunk * BLOCK_K + columns
        ahead_k = k + BLOCK_K
        ahead = tl.load(rows + ahead_k, mask=ahead_k < K, other=0.0, eviction_policy="evict_first")
        wide = weight.to(tl.float32)
        sum0 += _products(wide, x_ptr, k, K, EVEN, VECTOR)
        if M > 1:
            sum1 += _products(wide, x_ptr + K, k, K, EVEN, VECTOR)
        if M > 2:
            sum2 += _products(wide, x_ptr + 2 * K, k, K, EVEN, VECTOR)
        if M > 3:
            sum3 += _products(wide, x_ptr + 3 * K, k, K, EVEN, VECTOR)
        weight = ahead
    scale = tl.full((BLOCK_N,), 1.0, tl.float32)
    if HAS_SCALE:
        scale = tl.load(scale_ptr + n, mask=n < N, other=0.0)
    bias = tl.zeros((BLOCK_N,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    _store_row(y_ptr, n, N, sum0, scale, bias)
    if M > 1:
        _store_row(y_ptr + N, n, N, sum1, scale, bias)
    if M > 2:
        _store_row(y_ptr + 2 * N, n, N, sum2, scale, bias)
    if M > 3:
        _store_row(y_ptr + 3 * N, n, N, sum3, scale, bias)


@triton.jit
def _products(  # type: ignore[no-untyped-def]
    weight, x_ptr, k, K: tl.constexpr, EVEN: tl.constexpr, VECTOR: tl.constexpr
):
    """Each thread's products, added up: an eighth of the registers that a sum for each column takes."""
    if EVEN:
        x = tl.load(x_ptr + k)  # [1, BLOCK_K]
    else:
        x = tl.load(x_ptr + k, mask=k < K, other=0.0)
    products = weight * x.to(tl.float32)
    split = tl.reshape(products, (products.shape[0], products.shape[1] // VECTOR, VECTOR))
    return tl.sum(split, axis=2)


@triton.jit
def _store_row(y_ptr, n, N, sums, scale, bias):  # type: ignore[no-untyped-def]
    y = tl.sum(sums, axis=1) * scale + bias
    tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def _tile_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [M, K]
    weight_ptr,  # [N, K]
    scale_ptr,  # [N] fp32, of a float8 W
    bias_ptr,  # [N]
    y_ptr,  # [M, N]
    parts_ptr,  # [num_tiles, SPLIT_K, BLOCK_N, BLOCK_M] fp32
    counts_ptr,  # [num_tiles] int32, zero before and after
    M,
    N,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    CHUNKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    tile = tl.program_id(0)
    part = tl.program_id(1)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    # Rows past the end read the last one; what comes of them is not stored.
    weight_rows = weight_ptr + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K
    x_rows = x_ptr + tl.minimum(m, M - 1)[:, None] * K
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    first = part * CHUNKS // SPLIT_K
    last = (part + 1) * CHUNKS // SPLIT_K
    for chunk in tl.range(first, last, num_stages=STAGES):
        k = chunk * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
        if K % BLOCK_K == 0:
            weight = tl.load(weight_rows + k, eviction_policy="evict_first")
            x = tl.load(x_rows + k)
        else:
            weight = tl.load(weight_rows + k, mask=k < K, other=0.0, eviction_policy="evict_first")
            x = tl.load(x_rows + k, mask=k < K, other=0.0)
        # W on the left: its 64 rows or more fill the tensor cores that the few rows of x would not.
        sums = tl.dot(weight.to(x.dtype), tl.trans(x), sums)
    if SPLIT_K == 1:
        _store_tile(y_ptr, scale_ptr, bias_ptr, n, m, M, N, sums, HAS_SCALE, HAS_BIAS)
    else:
        inside = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + m[None, :]
        parts = parts_ptr + tile.to(tl.int64) * (SPLIT_K * BLOCK_N * BLOCK_M) + inside
        tl.store(parts + part * (BLOCK_N * BLOCK_M), sums)
        # All threads' stores come before the one thread's release.
        tl.debug_barrier()
        arrived = tl.atomic_add(counts_ptr + tile, 1, sem="acq_rel", scope="gpu")
        if arrived == SPLIT_K - 1:
            # The last CTA of the tile adds the parts, always in the same order.
            total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for other in tl.static_range(SPLIT_K):
                total += tl.load(parts + other * (BLOCK_N * BLOCK_M), cache_modifier=".cg")
            _store_tile(y_ptr, scale_ptr, bias_ptr, n, m, M, N, total, HAS_SCALE, HAS_BIAS)
            tl.store(counts_ptr + tile, 0)


@triton.jit
def _store_tile(  # type: ignore[no-untyped-def]
    y_ptr, scale_ptr, bias_ptr, n, m, M, N, sums, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr
):
    if HAS_SCALE:
        sums *= tl.load(scale_ptr + n, mask=n < N, other=0.0)[:, None]
    if HAS_BIAS:
        sums += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    mask = (n < N)[:, None] & (m < M)[None, :]
    tl.store(y_ptr + m[None, :] * N + n[:, None], sums.to(y_ptr.dtype.element_ty), mask=mask)


def gemv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    config: GemvConfig,
    launch: dict[str, bool] | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """[1..4, K] x [N, K] -> [1..4, N]; `launch` holds "launch_pdl" where the kernel may start early.

    With `scale` [N], W is in float8.
    """
    (m, k), n = x.shape, weight.shape[0]
    assert m <= MAX_GEMV_ROWS
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    _gemv_kernel[(triton.cdiv(n, config.block_n),)](
        x,
        weight,
        weight if scale is None else scale,
        weight if bias is None else bias,
        y,
        n,
        M=m,
        K=k,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        VECTOR=config.vector,
        HAS_SCALE=scale is not None,
        HAS_BIAS=bias is not None,
        PDL=bool(launch),
        num_warps=config.num_warps,
        **(launch or {}),
    )
    return y


def tiled(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    config: TileConfig,
    counters: torch.Tensor,
    launch: dict[str, bool] | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """[1..64, K] x [N, K] -> [1..64, N]. `counters` is int32 zeros, [COUNTERS] or one for each tile of N;
    it is zero again afterwards, and two products must not use it at once.

    With `scale` [N], W is in float8.
    """
    (m, k), n = x.shape, weight.shape[0]
    block_m, tiles = max(MIN_DOT_ROWS, row_class(m)), triton.cdiv(n, config.block_n)
    assert config.split_k == 1 or tiles <= len(counters)
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    size = tiles * config.split_k * config.block_n * block_m if config.split_k > 1 else 1
    parts = torch.empty(size, dtype=torch.float32, device=x.device)
    _tile_kernel[(tiles, config.split_k)](
        x,
        weight,
        weight if scale is None else scale,
        weight if bias is None else bias,
        y,
        parts,
        counters,
        m,
        n,
        K=k,
        BLOCK_M=block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        SPLIT_K=config.split_k,
        STAGES=config.num_stages,
        HAS_SCALE=scale is not None,
        HAS_BIAS=bias is not None,
        PDL=bool(launch),
        num_warps=config.num_warps,
        **(launch or {}),
    )
    return y


class SmallLinear:
    """Picks the kernel for a product's shape; PyTorch's where the rows are many or cuBLAS is faster."""

    def __init__(self, device: torch.device, launch: dict[str, bool] | None = None) -> None:
        self._counters = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
        self._launch = launch

    def __call__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[M, K] x [N, K] (+ [N]) -> [M, N], summed in fp32.

        With `scale` [N], W is in float8, M is at most 64, x has 16 bits and K is a multiple of 16.
        """
        (m, k), n = x.shape, weight.shape[0]
        if scale is not None:
            assert m <= MAX_TILED_ROWS and x.dtype.itemsize == 2 and k % 16 == 0
            if m == 0:
                return x.new_empty(0, n)
            return self.run(x.contiguous(), weight, bias, float8_configuration(m, n, k), scale)
        if not 1 <= m <= MAX_TILED_ROWS or x.dtype.itemsize != 2 or k % 8:
            return F.linear(x, weight, bias)  # no rows, many rows, fp32, or rows of W not 16-byte aligned
        config = configuration(m, n, k)
        if config is None:
            return F.linear(x, weight, bias)
        return self.run(x.contiguous(), weight, bias, config)

    def run(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        config: Config,
        scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The product by one configuration."""
        if isinstance(config, GemvConfig):
            return gemv(x, weight, bias, config, self._launch, scale)
        return tiled(x, weight, bias, config, self._counters, self._launch, scale)


def candidates(rows: int, n: int, k: int, weight_bytes: int = 2) -> Iterator[Config]:
    """Configurations worth measuring; `weight_bytes` of an element of W: 1 is float8."""
    if rows <= MAX_GEMV_ROWS:
        yield from _gemv_candidates(n, weight_bytes)
    if rows > 1:
        yield from _tile_candidates(max(MIN_DOT_ROWS, row_class(rows)), n, k, weight_bytes)


def _gemv_candidates(n: int, weight_bytes: int) -> Iterator[GemvConfig]:
    if weight_bytes == 1:
        for num_warps in (1, 2):  # one row of W is of x's shape: then x needs no exchange either
            yield GemvConfig(1, 512 * num_warps, num_warps, 16)
    for num_warps, block_n in (
        (1, 8),
        (2, 2),
        (2, 4),
        (2, 8),
        (4, 1),
        (4, 2),
        (4, 4),
        (4, 8),
        (8, 2),
        (8, 4),
    ):
        if n // block_n >= 2 * NUM_SMS:
            for vector in (8, 16) if weight_bytes == 1 else (8,):
                yield GemvConfig(block_n, 32 * vector * num_warps, num_warps, vector)


def _tile_candidates(block_m: int, n: int, k: int, weight_bytes: int) -> Iterator[TileConfig]:
    """Enough CTAs, none of them with more than one SM's shared memory."""
    for block_n, block_k, num_warps in (
        (64, 128, 4),
        (64, 256, 4),
        (128, 64, 8),
        (128, 128, 8),
        (128, 128, 4) if weight_bytes == 1 else (128, 64, 4),
    ):
        tiles, chunks = triton.cdiv(n, block_n), triton.cdiv(k, block_k)
        for num_stages in (3, 4, 5):
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
