"""One query a sequence against its pages: split-KV attention (flash-decoding) in one Triton launch.

Lengths are read on the device and the grid depends on shapes alone, so that a captured CUDA graph serves
any contexts.  Method: Dao et al. 2023 (flash-decoding); pages: Kwon et al. 2023 (vLLM).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from llm_service.kv_cache import LayerCache

# Partial results merged by one program; more would make that program the longest.
MAX_SPLITS = 32
# A split costs a program's start and a share of the merge; beyond this many tokens it is always worth it.
MAX_MIN_SPLIT = 512
# Sequences times KV heads that may be split at once; each has a counter of finished splits.
MAX_SPLIT_PAIRS = 1 << 16
LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class DecodeTiling:
    """How the work is cut: `block_n` keys at a time, into about `target_programs` programs."""

    block_n: int
    num_warps: int
    num_stages: int
    target_programs: int


# Best or within a tenth of it at every batch and context of `python -m llm_service.attention.timing --sweep`
# on an H200: 2.2 TB/s at 64 x 400 tokens, 4.0 at 64 x 3600.  Four-byte elements take twice the room.
TWO_BYTES = DecodeTiling(block_n=64, num_warps=4, num_stages=2, target_programs=512)
FOUR_BYTES = DecodeTiling(block_n=64, num_warps=4, num_stages=2, target_programs=1024)


def new_counters(device: torch.device) -> torch.Tensor:
    """The counters that `paged_decode` needs: all zero, and zero again after every launch."""
    return torch.zeros(MAX_SPLIT_PAIRS, dtype=torch.int32, device=device)


def paged_decode(
    query: torch.Tensor,  # [num_tokens, num_heads, head_dim], last dimension contiguous
    cache: LayerCache,
    rows: torch.Tensor,  # [batch] int32: each sequence's row of `query` and `output`
    block_tables: torch.Tensor,  # [batch, max_blocks] int32
    context_lens: torch.Tensor,  # [batch] int32; 0 marks a padding row, which gets zeros
    output: torch.Tensor,  # [num_tokens, num_heads, head_dim] contiguous
    counters: torch.Tensor,
    tiling: DecodeTiling | None = None,
) -> None:
    """Write softmax(q k / sqrt(head_dim)) v of each sequence into its row of `output`.

    Launches with the same `counters` must follow one another on one stream.
    """
    if tiling is None:
        tiling = TWO_BYTES if query.element_size() <= 2 else FOUR_BYTES
    num_heads, head_dim = query.shape[1:]
    _, block_size, num_kv_heads, _ = cache.key.shape
    pairs = len(context_lens) * num_kv_heads
    num_splits, min_split = split_plan(pairs, block_tables.shape[1] * block_size, tiling)
    group = num_heads // num_kv_heads
    partials, partial_lse = _partials(query, pairs * num_splits * group if num_splits > 1 else 0)
    _decode_kernel[(pairs, num_splits)](
        output,
        query,
        cache.key,
        cache.value,
        rows,
        block_tables,
        context_lens,
        partials,
        partial_lse,
        counters,
        head_dim**-0.5 * LOG2_E,
        query.stride(0),
        query.stride(1),
        block_tables.stride(0),
        min_split,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        PAGE_SIZE=block_size,
        BLOCK_M=max(16, triton.next_power_of_2(group)),
        BLOCK_N=tiling.block_n,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )


def split_plan(pairs: int, max_context: int, tiling: DecodeTiling = TWO_BYTES) -> tuple[int, int]:
    """Splits a (sequence, KV head), and the fewest tokens that deserve a split of their own.

    Few pairs are cut fine to fill the device; many are cut only where one context is far longer than others.
    """
    if pairs > MAX_SPLIT_PAIRS:
        return 1, max_context
    min_split = min(max(triton.next_power_of_2(pairs), tiling.block_n), MAX_MIN_SPLIT)
    wanted = min(max(tiling.target_programs // pairs, 2), MAX_SPLITS)
    return max(1, min(wanted, -(-max_context // min_split))), min_split


def _partials(query: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for normalised partial outputs and their base-2 log-sum-exp, in fp32."""
    rows = query.new_empty((num_rows, query.shape[2]), dtype=torch.float32)
    return rows, query.new_empty((num_rows,), dtype=torch.float32)


@triton.jit(do_not_specialize=["table_stride", "min_split"])
def _decode_kernel(  # type: ignore[no-untyped-def]
    output,
    query,
    key_cache,
    value_cache,
    rows,
    block_tables,
    context_lens,
    partials,
    partial_lse,
    counters,
    scale,
    query_token_stride,
    query_head_stride,
    table_stride,
    min_split,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pair = tl.program_id(0)
    split = tl.program_id(1)
    num_splits = tl.num_programs(1)
    sequence = pair // NUM_KV_HEADS
    kv_head = pair % NUM_KV_HEADS
    context_len = tl.load(context_lens + sequence)
    split_len = tl.maximum(tl.cdiv(tl.cdiv(context_len, num_splits), BLOCK_N) * BLOCK_N, min_split)
    used_splits = tl.cdiv(context_len, split_len)
    if split >= tl.maximum(used_splits, 1):
        return
    start = split * split_len
    end = tl.minimum(start + split_len, context_len)

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    is_head = offs_m < GROUP
    is_dim = offs_d < HEAD_DIM
    row = tl.load(rows + sequence).to(tl.int64)
    head = kv_head * GROUP + offs_m
    q = tl.load(
        query + row * query_token_stride + head[:, None] * query_head_stride + offs_d[None, :],
        mask=is_head[:, None] & is_dim[None, :],
        other=0.0,
    )

    table = block_tables + sequence.to(tl.int64) * table_stride
    TOKEN_STRIDE: tl.constexpr = NUM_KV_HEADS * HEAD_DIM
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # Page numbers are read one tile ahead, so that K and V never wait for them.
    pages = tl.load(table + (start + offs_n) // PAGE_SIZE, mask=start + offs_n < end, other=0)
    for first in range(start, end, BLOCK_N):
        positions = first + offs_n
        seen = positions < end
        slots = (pages.to(tl.int64) * PAGE_SIZE + positions % PAGE_SIZE) * TOKEN_STRIDE + kv_head * HEAD_DIM
        coming = positions + BLOCK_N
        pages = tl.load(table + coming // PAGE_SIZE, mask=coming < end, other=0)
        k = tl.load(
            key_cache + slots[None, :] + offs_d[:, None], mask=seen[None, :] & is_dim[:, None], other=0.0
        )
        v = tl.load(
            value_cache + slots[:, None] + offs_d[None, :], mask=seen[:, None] & is_dim[None, :], other=0.0
        )
        scores = tl.dot(q, k, input_precision="tf32x3") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        raised = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - raised[:, None])
        shrink = tl.exp2(highest - raised)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="tf32x3")
        highest = raised

    is_output = is_head[:, None] & is_dim[None, :]
    output_rows = output + row * (NUM_KV_HEADS * GROUP * HEAD_DIM)
    output_tile = output_rows + head[:, None] * HEAD_DIM + offs_d[None, :]
    # A padding row has seen nothing: zeros, not 0 / 0.
    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    if used_splits <= 1:
        tl.store(output_tile, acc.to(output.dtype.element_ty), mask=is_output)
    else:
        pair_rows = (pair.to(tl.int64) * num_splits) * GROUP + offs_m
        own_rows = pair_rows + split * GROUP
        tl.store(partials + own_rows[:, None] * HEAD_DIM + offs_d[None, :], acc, mask=is_output)
        tl.store(partial_lse + own_rows, highest + tl.log2(total), mask=is_head)
        # All threads' stores come before the count; whoever counts last sees every split's.
        tl.debug_barrier()
        finished = tl.atomic_add(counters + pair, 1, sem="acq_rel", scope="gpu")
        if finished == used_splits - 1:
            tl.debug_barrier()
            tl.store(counters + pair, 0)
            merged = _merge(partials, partial_lse, pair_rows, used_splits, GROUP, HEAD_DIM, BLOCK_M, BLOCK_D)
            tl.store(output_tile, merged.to(output.dtype.element_ty), mask=is_output)


@triton.jit
def _merge(  # type: ignore[no-untyped-def]
    partials,
    partial_lse,
    pair_rows,
    used_splits,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Weigh the splits' outputs by log-sum-exp: [BLOCK_M, BLOCK_D].  Reads past L1, which may be stale."""
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    # Finite, so that rows without a head stay free of inf - inf.
    highest = tl.full([BLOCK_M], -1e38, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(0, used_splits, 8):
        # Eight independent loads in flight hide most of the latency of L2.  The maximum runs along, because
        # one over all splits would come in a layout whose exchange is a barrier between the loads.
        for i in tl.static_range(8):
            is_part = offs_m < tl.where(first + i < used_splits, GROUP, 0)
            split_rows = pair_rows + (first + i) * GROUP
            lse = tl.load(partial_lse + split_rows, mask=is_part, other=-1e38, cache_modifier=".cg")
            part = tl.load(
                partials + split_rows[:, None] * HEAD_DIM + offs_d[None, :],
                mask=is_part[:, None] & (offs_d < HEAD_DIM)[None, :],
                other=0.0,
                cache_modifier=".cg",
            )
            raised = tl.maximum(highest, lse)
            shrink, weight = tl.exp2(highest - raised), tl.exp2(lse - raised)
            total = total * shrink + weight
            acc = acc * shrink[:, None] + part * weight[:, None]
            highest = raised
    return acc / total[:, None]
