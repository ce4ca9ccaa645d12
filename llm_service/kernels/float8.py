"""Rows of activations in float8, by Triton, and their product with W in float8, by torch._scaled_mm.

For CUDA devices of compute capability 8.9 and newer only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llm_service.model.float8 import FLOAT8, LARGEST, SMALLEST_AMAX, Float8Rows


@triton.jit
def _quantize_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [M, K]
    values_ptr,  # [M, K] float8
    scale_ptr,  # [M] fp32
    K,
    LARGEST: tl.constexpr,
    SMALLEST_AMAX: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < K
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    x = tl.load(x_ptr + row * K + columns, mask=mask, other=0.0).to(tl.float32)
    amax = tl.maximum(tl.max(tl.abs(x), axis=0), SMALLEST_AMAX)
    # The largest element comes out as 448 or just above it, which rounds to 448.
    values = x * (LARGEST / amax)
    tl.store(values_ptr + row * K + columns, values.to(values_ptr.dtype.element_ty), mask=mask)
    tl.store(scale_ptr + row, amax / LARGEST)


@triton.jit
def _silu_quantize_kernel(  # type: ignore[no-untyped-def]
    gate_up_ptr,  # [M, 2 * size]
    values_ptr,  # [M, size] float8
    scale_ptr,  # [M] fp32
    size,
    LARGEST: tl.constexpr,
    SMALLEST_AMAX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    gates = gate_up_ptr + row * 2 * size
    dtype = gate_up_ptr.dtype.element_ty
    # The first pass bounds the row: silu(g) is between g / 2 and g above 0, and below it no further from 0
    # than g / 2 and 0.2785. A bound up to twice the largest costs float8 no digits, and this pass no exp().
    bounds = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        gate, up = _gate_and_up(gates, columns, size)
        silu = tl.where(gate > 0, gate, tl.minimum(-0.5 * gate, 0.2785))
        bounds = tl.maximum(bounds, silu * tl.abs(up))
    # Rounding to `dtype` on the way, twice, may exceed the bound.
    amax = tl.maximum(tl.max(bounds, axis=0) * 1.016, SMALLEST_AMAX)
    inverse = LARGEST / amax
    # The second pass reads the row again, from the L2 cache.
    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        gate, up = _gate_and_up(gates, columns, size)
        silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
        product = (silu * up).to(dtype).to(tl.float32) * inverse
        at = values_ptr + row * size + columns
        tl.store(at, product.to(values_ptr.dtype.element_ty), mask=columns < size)
    tl.store(scale_ptr + row, amax / LARGEST)


@triton.jit
def _gate_and_up(gates, columns, size):  # type: ignore[no-untyped-def]
    mask = columns < size
    gate = tl.load(gates + columns, mask=mask, other=0.0).to(tl.float32)
    return gate, tl.load(gates + size + columns, mask=mask, other=0.0).to(tl.float32)


def quantize(x: torch.Tensor, launch: dict[str, bool] | None = None) -> Float8Rows:
    """[M, K] in float8, one scale a row; `launch` holds "launch_pdl" where the kernel may start early."""
    x = x.contiguous()
    m, k = x.shape
    rows = empty_rows(m, k, x.device)
    block = triton.next_power_of_2(k)
    _quantize_kernel[(m,)](
        x,
        rows.values,
        rows.scale,
        k,
        LARGEST=LARGEST,
        SMALLEST_AMAX=SMALLEST_AMAX,
        BLOCK=block,
        PDL=bool(launch),
        num_warps=min(16, max(1, block // 512)),
        **(launch or {}),
    )
    return rows


def silu_mul_quantize(gate_up: torch.Tensor) -> Float8Rows:
    """[M, 2 * size], gate first -> silu(gate) * up in float8, one scale a row."""
    gate_up = gate_up.contiguous()
    m, size = gate_up.shape[0], gate_up.shape[1] // 2
    rows = empty_rows(m, size, gate_up.device)
    # A CTA of 1024 threads: so many rows are under way as the L2 cache holds until they are read again.
    block = min(8192, triton.next_power_of_2(size))
    _silu_quantize_kernel[(m,)](
        gate_up,
        rows.values,
        rows.scale,
        size,
        LARGEST=LARGEST,
        SMALLEST_AMAX=SMALLEST_AMAX,
        BLOCK=block,
        num_warps=max(1, block // 256),
    )
    return rows


def empty_rows(num_rows: int, size: int, device: torch.device) -> Float8Rows:
    values = torch.empty(num_rows, size, dtype=FLOAT8, device=device)
    return Float8Rows(values, torch.empty(num_rows, dtype=torch.float32, device=device))


def scaled_product(
    rows: Float8Rows,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """[M, K] x [N, K] float8 with `scale` [N] (+ [N]) -> [M, N] in `dtype`, which is bfloat16.

    K and N are multiples of 16, M is at least 1.
    """
    product: torch.Tensor = torch._scaled_mm(
        rows.values,
        weight.t(),
        scale_a=rows.scale[:, None],
        scale_b=scale[None],
        bias=bias,
        out_dtype=dtype,
        # Sums stay in the tensor cores, at some 14 bits: the operands have 4.
        use_fast_accum=True,
    )
    return product
