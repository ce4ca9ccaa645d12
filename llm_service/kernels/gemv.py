"""y = x W^T + b for 1 to 4 rows of x, by multiply-adds on whole rows of W: Triton, for CUDA only."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llm_service.kernels.linear_config import MAX_GEMV_ROWS, GemvConfig

VECTOR = tl.constexpr(8)  # 16-bit elements that a thread loads at once


@triton.jit
def _gemv_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [M, K]
    weight_ptr,  # [N, K]
    bias_ptr,  # [N]
    y_ptr,  # [M, N]
    N,
    M: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    CHUNKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    EVEN: tl.constexpr = K % BLOCK_K == 0
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)[None, :]
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
        sum0 += _products(wide, x_ptr, k, K, EVEN)
        if M > 1:
            sum1 += _products(wide, x_ptr + K, k, K, EVEN)
        if M > 2:
            sum2 += _products(wide, x_ptr + 2 * K, k, K, EVEN)
        if M > 3:
            sum3 += _products(wide, x_ptr + 3 * K, k, K, EVEN)
        weight = ahead
    bias = tl.zeros((BLOCK_N,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    _store_row(y_ptr, n, N, sum0, bias)
    if M > 1:
        _store_row(y_ptr + N, n, N, sum1, bias)
    if M > 2:
        _store_row(y_ptr + 2 * N, n, N, sum2, bias)
    if M > 3:
        _store_row(y_ptr + 3 * N, n, N, sum3, bias)


@triton.jit
def _products(weight, x_ptr, k, K: tl.constexpr, EVEN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each thread's products, added up: an eighth of the registers that a sum for each column takes."""
    if EVEN:
        x = tl.load(x_ptr + k)  # [1, BLOCK_K]
    else:
        x = tl.load(x_ptr + k, mask=k < K, other=0.0)
    products = weight * x.to(tl.float32)
    split = tl.reshape(products, (products.shape[0], products.shape[1] // VECTOR, VECTOR))
    return tl.sum(split, axis=2)


@triton.jit
def _store_row(y_ptr, n, N, sums, bias):  # type: ignore[no-untyped-def]
    y = tl.sum(sums, axis=1) + bias
    tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


def gemv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    config: GemvConfig,
    launch: dict[str, bool] | None = None,
) -> torch.Tensor:
    """[1..4, K] x [N, K] -> [1..4, N]; `launch` holds "launch_pdl" where the kernel may start early."""
    (m, k), n = x.shape, weight.shape[0]
    assert m <= MAX_GEMV_ROWS
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    _gemv_kernel[(triton.cdiv(n, config.block_n),)](
        x,
        weight,
        weight if bias is None else bias,
        y,
        n,
        M=m,
        K=k,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        HAS_BIAS=bias is not None,
        PDL=bool(launch),
        num_warps=config.num_warps,
        **(launch or {}),
    )
    return y
