"""The decoder's elementwise work in one pass each: norms, SwiGLU, rotation with the write to the paged cache.

Triton, for CUDA only. Every rounding to the activation dtype falls where PyTorch's unfused operators round.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llm_service.kernels.float8 import empty_rows
from llm_service.model.float8 import LARGEST, SMALLEST_AMAX, Float8Rows

HEADS_PER_PROGRAM = 4
SILU_BLOCK = 1024

Launch = dict[str, bool]  # "launch_pdl" where a kernel may start before the one before it has ended


@triton.jit
def _norm_kernel(  # type: ignore[no-untyped-def]
    hidden_ptr,  # [num_rows, SIZE]
    residual_ptr,  # [num_rows, SIZE]
    weight_ptr,  # [SIZE]
    normed_ptr,  # [num_rows, SIZE], float8 where it is rounded
    scale_ptr,  # [num_rows] fp32, where it is rounded
    sum_ptr,  # [num_rows, SIZE]
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ROUND: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST_AMAX: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0)
    start = row.to(tl.int64) * SIZE
    columns = tl.arange(0, BLOCK)
    mask = columns < SIZE
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    dtype = hidden_ptr.dtype.element_ty
    hidden = tl.load(hidden_ptr + start + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        hidden += tl.load(residual_ptr + start + columns, mask=mask, other=0.0).to(tl.float32)
        hidden = hidden.to(dtype).to(tl.float32)
        tl.store(sum_ptr + start + columns, hidden.to(dtype), mask=mask)
    scale = tl.rsqrt(tl.sum(hidden * hidden, axis=0) / SIZE + eps)
    normed = (hidden * scale).to(dtype).to(tl.float32) * weight
    normed = normed.to(dtype)
    if ROUND:
        normed = normed.to(tl.float32)
        amax = tl.maximum(tl.max(tl.abs(normed), axis=0), SMALLEST_AMAX)
        tl.store(scale_ptr + row, amax / LARGEST)
        normed = (normed * (LARGEST / amax)).to(normed_ptr.dtype.element_ty)
    tl.store(normed_ptr + start + columns, normed, mask=mask)


def _launch_norm(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    launch: Launch | None,
    rows: Float8Rows | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm goes to `rows`, if they are given."""
    size = hidden.shape[-1]
    hidden = hidden.contiguous()
    normed = torch.empty_like(hidden) if rows is None else rows.values
    total = hidden if residual is None else torch.empty_like(hidden)
    block = triton.next_power_of_2(size)
    _norm_kernel[(hidden.numel() // size,)](
        hidden,
        hidden if residual is None else residual.contiguous(),
        weight,
        normed,
        weight if rows is None else rows.scale,
        total,
        eps,
        SIZE=size,
        BLOCK=block,
        HAS_RESIDUAL=residual is not None,
        ROUND=rows is not None,
        LARGEST=LARGEST,
        SMALLEST_AMAX=SMALLEST_AMAX,
        PDL=bool(launch),
        num_warps=min(16, max(1, block // 512)),
        **(launch or {}),
    )
    return normed, total


def rms_norm(
    hidden: torch.Tensor, weight: torch.Tensor, eps: float, launch: Launch | None = None
) -> torch.Tensor:
    """Of the last dimension, in Llama's order: fp32, cast, times the weight [size]."""
    return _launch_norm(hidden, None, weight, eps, launch)[0]


def add_rms_norm(
    hidden: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    launch: Launch | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of hidden + residual, and that sum."""
    return _launch_norm(hidden, residual, weight, eps, launch)


def norm_quantize(
    hidden: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[Float8Rows, torch.Tensor]:
    """The norm of hidden + residual [num_rows, size] in float8, and that sum."""
    rows = empty_rows(hidden.shape[0], hidden.shape[1], hidden.device)
    return rows, _launch_norm(hidden, residual, weight, eps, None, rows)[1]


@triton.jit
def _silu_mul_kernel(  # type: ignore[no-untyped-def]
    gate_up_ptr,  # [num_rows, 2 * size]
    output_ptr,  # [num_rows, size]
    size,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    gates = gate_up_ptr + row * 2 * size + columns
    gate = tl.load(gates, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gates + size, mask=mask, other=0.0).to(tl.float32)
    dtype = output_ptr.dtype.element_ty
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(output_ptr + row * size + columns, (silu * up).to(dtype), mask=mask)


def silu_mul(gate_up: torch.Tensor, launch: Launch | None = None) -> torch.Tensor:
    """[num_rows, 2 * size], gate first -> silu(gate) * up, [num_rows, size]."""
    gate_up = gate_up.contiguous()
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    output = torch.empty(num_rows, size, dtype=gate_up.dtype, device=gate_up.device)
    _silu_mul_kernel[(num_rows, triton.cdiv(size, SILU_BLOCK))](
        gate_up, output, size, BLOCK=SILU_BLOCK, PDL=bool(launch), num_warps=4, **(launch or {})
    )
    return output


@triton.jit
def _rotate_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr,  # [num_tokens, Q + 2 * KV, 2 * HALF]
    positions_ptr,  # [num_tokens] int64
    cos_ptr,  # [max_positions, 2 * HALF]
    sin_ptr,  # [max_positions, 2 * HALF], signed
    norm_ptr,  # [Q + KV, 2 * HALF]
    slots_ptr,  # [num_tokens] int64
    query_ptr,  # [num_tokens, Q, 2 * HALF]
    key_ptr,  # [num_tokens, KV, 2 * HALF]
    key_cache_ptr,  # [num_slots, KV, 2 * HALF]
    value_cache_ptr,  # [num_slots, KV, 2 * HALF]
    eps,
    Q: tl.constexpr,
    KV: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    HAS_NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    column = tl.arange(0, BLOCK_HALF)[None, :]
    inside = column < HALF
    is_query = (head < Q) & inside
    is_key = (head >= Q) & (head < Q + KV) & inside
    is_value = (head >= Q + KV) & (head < Q + 2 * KV) & inside
    dtype = query_ptr.dtype.element_ty
    low = head * (2 * HALF) + column  # the first half of a head's dimensions; the second is HALF further
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    heads = qkv_ptr + token * ((Q + 2 * KV) * 2 * HALF) + low
    any_head = (head < Q + 2 * KV) & inside
    a = tl.load(heads, mask=any_head, other=0.0)
    b = tl.load(heads + HALF, mask=any_head, other=0.0)
    slot = tl.load(slots_ptr + token + tl.zeros((1, 1), tl.int64))  # a block, as masks are
    cached = slot * (KV * 2 * HALF)
    is_cached = slot >= 0
    value_at = value_cache_ptr + cached + low - (Q + KV) * 2 * HALF
    tl.store(value_at, a, mask=is_value & is_cached)
    tl.store(value_at + HALF, b, mask=is_value & is_cached)

    a = a.to(tl.float32)
    b = b.to(tl.float32)
    if HAS_NORM:
        is_normed = (head < Q + KV) & inside
        scale = tl.rsqrt(tl.sum(a * a + b * b, axis=1) / (2 * HALF) + eps)[:, None]
        norm_a = tl.load(norm_ptr + low, mask=is_normed, other=0.0).to(tl.float32)
        norm_b = tl.load(norm_ptr + low + HALF, mask=is_normed, other=0.0).to(tl.float32)
        a = ((a * scale).to(dtype).to(tl.float32) * norm_a).to(dtype).to(tl.float32)
        b = ((b * scale).to(dtype).to(tl.float32) * norm_b).to(dtype).to(tl.float32)
    angle = tl.load(positions_ptr + token) * (2 * HALF) + column
    cos_a = tl.load(cos_ptr + angle, mask=inside, other=0.0).to(tl.float32)
    cos_b = tl.load(cos_ptr + angle + HALF, mask=inside, other=0.0).to(tl.float32)
    sin_a = tl.load(sin_ptr + angle, mask=inside, other=0.0).to(tl.float32)
    sin_b = tl.load(sin_ptr + angle + HALF, mask=inside, other=0.0).to(tl.float32)
    # rotate() rounds each product, then the sum.
    turned_a = (a * cos_a).to(dtype).to(tl.float32) + (b * sin_a).to(dtype).to(tl.float32)
    turned_b = (b * cos_b).to(dtype).to(tl.float32) + (a * sin_b).to(dtype).to(tl.float32)
    turned_a = turned_a.to(dtype)
    turned_b = turned_b.to(dtype)

    query_at = query_ptr + token * (Q * 2 * HALF) + low
    tl.store(query_at, turned_a, mask=is_query)
    tl.store(query_at + HALF, turned_b, mask=is_query)
    key_at = key_ptr + token * (KV * 2 * HALF) + low - Q * 2 * HALF
    tl.store(key_at, turned_a, mask=is_key)
    tl.store(key_at + HALF, turned_b, mask=is_key)
    key_at = key_cache_ptr + cached + low - Q * 2 * HALF
    tl.store(key_at, turned_a, mask=is_key & is_cached)
    tl.store(key_at + HALF, turned_b, mask=is_key & is_cached)


def rotate_and_cache(
    qkv: torch.Tensor,  # [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]
    positions: torch.Tensor,  # [num_tokens] int64
    cos: torch.Tensor,  # [max_positions, 1, head_dim], of a RotaryTable
    sin: torch.Tensor,  # [max_positions, 1, head_dim], with rotate()'s signs
    norm: torch.Tensor | None,  # [num_heads + num_kv_heads, head_dim]: weights of the heads' RMSNorm
    eps: float,
    key_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim]
    value_cache: torch.Tensor,  # [num_blocks, block_size, num_kv_heads, head_dim]
    slots: torch.Tensor,  # [num_tokens] int64; a negative one is not written
    launch: Launch | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalise and rotate queries and keys, store keys and values in the cache.

    Returns queries [num_tokens, num_heads, head_dim] and keys [num_tokens, num_kv_heads, head_dim],
    contiguous, and the values as a view of `qkv`.
    """
    num_kv_heads, head_dim = key_cache.shape[2:]
    heads = qkv.contiguous().view(qkv.shape[0], -1, head_dim)
    num_tokens, num_heads = heads.shape[0], heads.shape[1] - 2 * num_kv_heads
    assert key_cache.is_contiguous() and value_cache.is_contiguous() and cos.is_contiguous()
    query = torch.empty(num_tokens, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    key = torch.empty(num_tokens, num_kv_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    _rotate_kernel[(num_tokens, triton.cdiv(heads.shape[1], HEADS_PER_PROGRAM))](
        heads,
        positions,
        cos,
        sin,
        heads if norm is None else norm,
        slots,
        query,
        key,
        key_cache,
        value_cache,
        eps,
        Q=num_heads,
        KV=num_kv_heads,
        HALF=head_dim // 2,
        BLOCK_HEADS=HEADS_PER_PROGRAM,
        BLOCK_HALF=triton.next_power_of_2(head_dim // 2),
        HAS_NORM=norm is not None,
        PDL=bool(launch),
        num_warps=2,
        # Or the compiler folds the rounding of one product into a multiply-add, as PyTorch does not.
        enable_fp_fusion=False,
        **(launch or {}),
    )
    return query, key, heads[:, num_heads + num_kv_heads :]
