"""y = x W^T + b for 1 to 4 rows of x and W in float8 with one scale a row: Triton, for CUDA only.

At the rate that memory gives, a multiprocessor has seven instructions for an element of W.  So W is read as
32-bit words of four elements, which one piece of assembly widens: two and a half instructions each with the
multiply-add.  (Triton's own conversion takes the words apart and together again and comes to six and a half.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llm_service.kernels.linear_config import MAX_GEMV_ROWS, GemvConfig

# Four elements (e4m3) to float32.
WIDEN = tl.constexpr("""{
    .reg .b16 low, high, a, b, c, d;
    .reg .b32 halves;
    mov.b32 {low, high}, $4;
    cvt.rn.f16x2.e4m3x2 halves, low;
    mov.b32 {a, b}, halves;
    cvt.rn.f16x2.e4m3x2 halves, high;
    mov.b32 {c, d}, halves;
    cvt.f32.f16 $0, a;
    cvt.f32.f16 $1, b;
    cvt.f32.f16 $2, c;
    cvt.f32.f16 $3, d;
}""")


@triton.jit
def _gemv_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [M, K / 4] int64: four elements each
    weight_ptr,  # [N, K / 4] int32: four elements each
    scale_ptr,  # [N] fp32
    bias_ptr,  # [N]
    y_ptr,  # [M, N], of x's element type
    N,
    M: tl.constexpr,
    WORDS: tl.constexpr,  # K / 4
    BLOCK_N: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
    VECTOR: tl.constexpr,  # words that a thread loads at once
    HAS_BIAS: tl.constexpr,
    IN_ASSEMBLY: tl.constexpr,
    PDL: tl.constexpr,
):
    CHUNKS: tl.constexpr = (WORDS + BLOCK_WORDS - 1) // BLOCK_WORDS
    UNROLL: tl.constexpr = CHUNKS if CHUNKS <= 8 else 4
    EVEN: tl.constexpr = WORDS % BLOCK_WORDS == 0
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.max_contiguous(tl.arange(0, BLOCK_WORDS), VECTOR)[None, :]
    # Rows past the end read the last one: no masks on the loads, and the stores are masked.
    rows = weight_ptr + tl.minimum(n, N - 1).to(tl.int64)[:, None] * WORDS
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if EVEN:
        words = tl.load(rows + columns, eviction_policy="evict_first")
    else:
        words = tl.load(rows + columns, mask=columns < WORDS, other=0, eviction_policy="evict_first")
    # Weights never change, so their first columns come while the kernel before still writes x.
    if PDL:
        tl.extra.cuda.gdc_wait()
    # One accumulator a row of x, spelt out: Triton has no arrays of tensors.
    sum0 = tl.zeros((BLOCK_N, BLOCK_WORDS), tl.float32)
    sum1 = sum0
    sum2 = sum0
    sum3 = sum0
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    for chunk in tl.range(0, CHUNKS, loop_unroll_factor=UNROLL):
        k = chunk * BLOCK_WORDS + columns
        ahead_k = k + BLOCK_WORDS
        ahead = tl.load(rows + ahead_k, mask=ahead_k < WORDS, other=0, eviction_policy="evict_first")
        a, b, c, d = _widen(words, IN_ASSEMBLY)
        sum0 = _add_products(sum0, a, b, c, d, x_ptr, k, WORDS, EVEN, dtype)
        if M > 1:
            sum1 = _add_products(sum1, a, b, c, d, x_ptr + WORDS, k, WORDS, EVEN, dtype)
        if M > 2:
            sum2 = _add_products(sum2, a, b, c, d, x_ptr + 2 * WORDS, k, WORDS, EVEN, dtype)
        if M > 3:
            sum3 = _add_products(sum3, a, b, c, d, x_ptr + 3 * WORDS, k, WORDS, EVEN, dtype)
        words = ahead
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
def _widen(words, IN_ASSEMBLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """A word's four elements in float32, the first one first."""
    if IN_ASSEMBLY:
        a, b, c, d = tl.inline_asm_elementwise(
            WIDEN,
            "=f,=f,=f,=f,r",
            [words],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        a = (words & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
        b = ((words >> 8) & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
        c = ((words >> 16) & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
        d = ((words >> 24) & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
    return a, b, c, d


@triton.jit
def _add_products(  # type: ignore[no-untyped-def]
    sums, a, b, c, d, x_ptr, k, WORDS: tl.constexpr, EVEN: tl.constexpr, dtype: tl.constexpr
):
    if EVEN:
        x = tl.load(x_ptr + k)  # [1, BLOCK_WORDS]
    else:
        x = tl.load(x_ptr + k, mask=k < WORDS, other=0)
    sums += a * x.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    sums += b * (x >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    sums += c * (x >> 32).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    sums += d * (x >> 48).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return sums


@triton.jit
def _store_row(y_ptr, n, N, sums, scale, bias):  # type: ignore[no-untyped-def]
    y = tl.sum(sums, axis=1) * scale + bias
    tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


def gemv_float8(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    config: GemvConfig,
    launch: dict[str, bool] | None = None,
) -> torch.Tensor:
    """[1..4, K] of 16 bits x [N, K] float8 with `scale` [N] -> [1..4, N]; K is a multiple of 16.

    `launch` holds "launch_pdl" where the kernel may start early.
    """
    (m, k), n = x.shape, weight.shape[0]
    assert m <= MAX_GEMV_ROWS and k % 16 == 0 and x.dtype.itemsize == 2
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    _gemv_kernel[(triton.cdiv(n, config.block_n),)](
        x.view(torch.int64),
        weight.view(torch.int32),
        scale,
        scale if bias is None else bias,
        y,
        n,
        M=m,
        WORDS=k // 4,
        BLOCK_N=config.block_n,
        BLOCK_WORDS=config.block_k // 4,
        VECTOR=config.vector // 4,
        HAS_BIAS=bias is not None,
        IN_ASSEMBLY=x.is_cuda,  # Triton's interpreter has none
        PDL=bool(launch),
        num_warps=config.num_warps,
        **(launch or {}),
    )
    return y
