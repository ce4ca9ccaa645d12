"""y = x W^T + b for many rows of x and W in float8: x to float8 by Triton, the product by torch._scaled_mm.

For CUDA devices of compute capability 8.9 and newer only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llm_service.model.float8 import FLOAT8, LARGEST, SMALLEST_AMAX


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


def quantize(x: torch.Tensor, launch: dict[str, bool] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """[M, K] -> its rows in float8 [M, K], and what each was divided by, fp32 [M]."""
    x = x.contiguous()
    m, k = x.shape
    values = torch.empty(m, k, dtype=FLOAT8, device=x.device)
    scale = torch.empty(m, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(k)
    _quantize_kernel[(m,)](
        x,
        values,
        scale,
        k,
        LARGEST=LARGEST,
        SMALLEST_AMAX=SMALLEST_AMAX,
        BLOCK=block,
        PDL=bool(launch),
        num_warps=min(16, max(1, block // 512)),
        **(launch or {}),
    )
    return values, scale


def float8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    launch: dict[str, bool] | None = None,
) -> torch.Tensor:
    """[M, K] bfloat16 x [N, K] float8 with `scale` [N] (+ [N]) -> [M, N]; K and N are multiples of 16."""
    values, x_scale = quantize(x, launch)
    product: torch.Tensor = torch._scaled_mm(
        values,
        weight.t(),
        scale_a=x_scale[:, None],
        scale_b=scale[None],
        bias=bias,
        out_dtype=x.dtype,
        # Sums stay in the tensor cores, at some 14 bits: the operands have 4.
        use_fast_accum=True,
    )
    return product
