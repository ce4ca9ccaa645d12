"""y = x W^T + b for up to 64 rows of x, on tensor cores with W as the left operand: Triton, for CUDA only."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llm_service.kernels.linear_config import MIN_DOT_ROWS, TileConfig, row_class

# Two elements (float8 e4m3) to bfloat16, by way of float32.  Triton goes from float16 to bfloat16 directly:
# of that a multiprocessor does 16 a cycle, and memory brings 18 elements.
TO_BFLOAT16 = tl.constexpr("""{
    .reg .b16 a, b;
    .reg .b32 halves;
    .reg .f32 wide_a, wide_b;
    cvt.rn.f16x2.e4m3x2 halves, $1;
    mov.b32 {a, b}, halves;
    cvt.f32.f16 wide_a, a;
    cvt.f32.f16 wide_b, b;
    cvt.rn.bf16x2.f32 $0, wide_b, wide_a;
}""")


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
    IN_ASSEMBLY: tl.constexpr,
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
        if HAS_SCALE and IN_ASSEMBLY:
            weight = tl.inline_asm_elementwise(
                TO_BFLOAT16, "=r,h", [weight], tl.bfloat16, is_pure=True, pack=2
            )
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
        IN_ASSEMBLY=x.is_cuda,  # Triton's interpreter has none
        PDL=bool(launch),
        num_warps=config.num_warps,
        **(launch or {}),
    )
    return y
