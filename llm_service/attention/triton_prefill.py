"""Causal attention of many chunks to their pages in one Triton launch: any lengths, any history.

The host cuts chunks into tiles of query rows; a program takes one tile of one head.
Method: Dao 2023 (FlashAttention-2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from llm_service.kv_cache import LayerCache

LOG2_E = math.log2(math.e)
TILE_FIELDS = 4  # sequence, first row, rows, position of the first row


@dataclass(frozen=True)
class Tiling:
    """Shape of a program's work besides its query rows: `block_n` keys at a time."""

    block_n: int
    num_warps: int
    num_stages: int


# Query rows a tile.  Prompts of a hundred or two hundred tokens fill tiles of 64 better; tiles of 128 read
# the keys of long ones half as often.
SHORT_TILE = 64
LONG_TILE = 128
LONG_CHUNK = 256
TILINGS = {SHORT_TILE: Tiling(64, 4, 2), LONG_TILE: Tiling(128, 8, 3)}
FOUR_BYTE_TILING = Tiling(32, 8, 2)


def choose_tile(longest: int) -> int:
    """Query rows a tile for chunks of which the longest has `longest` tokens."""
    return LONG_TILE if longest > LONG_CHUNK else SHORT_TILE


def cut_tiles(starts: list[int], query_lens: list[int], context_lens: list[int], tile: int) -> list[int]:
    """Flat records of TILE_FIELDS numbers, `tile` rows each; longest contexts first, short ones fill the end.

    Chunk i has rows starts[i] .. starts[i] + query_lens[i] and is sequence i of the block tables.
    """
    records = [
        (i, start + offset, min(tile, query_len - offset), context_len - query_len + offset)
        for i, (start, query_len, context_len) in enumerate(
            zip(starts, query_lens, context_lens, strict=True)
        )
        for offset in range(0, query_len, tile)
    ]
    records.sort(key=lambda record: -record[3])
    return [number for record in records for number in record]


def paged_prefill(
    query: torch.Tensor,  # [num_tokens, num_heads, head_dim], last dimension contiguous
    cache: LayerCache,
    tiles: torch.Tensor,  # [num_tiles, TILE_FIELDS] int32, from cut_tiles
    block_tables: torch.Tensor,  # [num_chunks, max_blocks] int32
    output: torch.Tensor,  # [num_tokens, num_heads, head_dim] contiguous
    tile: int,
    tiling: Tiling | None = None,
) -> None:
    """Write each chunk's attention to all cached tokens up to its own into its rows of `output`.

    `tile` is what cut_tiles was given; without `tiling` the one that suits it is used.
    """
    if tiling is None:
        tiling = TILINGS[tile] if query.element_size() <= 2 else FOUR_BYTE_TILING
    num_heads, head_dim = query.shape[1:]
    _, block_size, num_kv_heads, _ = cache.key.shape
    _prefill_kernel[(num_heads, len(tiles))](
        output,
        query,
        cache.key,
        cache.value,
        tiles,
        block_tables,
        head_dim**-0.5 * LOG2_E,
        query.stride(0),
        query.stride(1),
        block_tables.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=num_heads // num_kv_heads,
        HEAD_DIM=head_dim,
        PAGE_SIZE=block_size,
        BLOCK_M=tile,
        BLOCK_N=tiling.block_n,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )


@triton.jit(do_not_specialize=["table_stride"])
def _prefill_kernel(  # type: ignore[no-untyped-def]
    output,
    query,
    key_cache,
    value_cache,
    tiles,
    block_tables,
    scale,
    query_token_stride,
    query_head_stride,
    table_stride,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head = tl.program_id(0)
    tile = tiles + tl.program_id(1) * 4
    sequence = tl.load(tile)
    first_row = tl.load(tile + 1)
    num_rows = tl.load(tile + 2)
    first_position = tl.load(tile + 3)

    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    is_row = offs_m < num_rows
    is_dim = offs_d < HEAD_DIM
    rows = (first_row + offs_m).to(tl.int64)
    q = tl.load(
        query + rows[:, None] * query_token_stride + head * query_head_stride + offs_d[None, :],
        mask=is_row[:, None] & is_dim[None, :],
        other=0.0,
    )
    table = block_tables + sequence.to(tl.int64) * table_stride
    head_offset = (head // GROUP) * HEAD_DIM
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # Every row sees the keys up to the first row's position: those tiles need no mask.
    clear = (first_position + 1) // BLOCK_N * BLOCK_N
    end = first_position + num_rows
    highest, total, acc = _attend(
        q, highest, total, acc, key_cache + head_offset, value_cache + head_offset, table, scale,
        first_position + offs_m, 0, clear, end,
        NUM_KV_HEADS * HEAD_DIM, HEAD_DIM, PAGE_SIZE, BLOCK_N, BLOCK_D, False,
    )  # fmt: skip
    highest, total, acc = _attend(
        q, highest, total, acc, key_cache + head_offset, value_cache + head_offset, table, scale,
        first_position + offs_m, clear, end, end,
        NUM_KV_HEADS * HEAD_DIM, HEAD_DIM, PAGE_SIZE, BLOCK_N, BLOCK_D, True,
    )  # fmt: skip
    acc = acc / total[:, None]
    tl.store(
        output + (rows[:, None] * (NUM_KV_HEADS * GROUP) + head) * HEAD_DIM + offs_d[None, :],
        acc.to(output.dtype.element_ty),
        mask=is_row[:, None] & is_dim[None, :],
    )


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    q,
    highest,
    total,
    acc,
    keys,
    values,
    table,
    scale,
    row_positions,
    start,
    stop,
    context_len,
    TOKEN_STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Fold keys [start, stop) into the running softmax; `row_positions` [BLOCK_M] bound what a row sees."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    is_dim = offs_d < HEAD_DIM
    # Page numbers are read one tile ahead, so that K and V never wait for them.
    pages = tl.load(table + (start + offs_n) // PAGE_SIZE, mask=start + offs_n < context_len, other=0)
    for first in range(start, stop, BLOCK_N):
        positions = first + offs_n
        slots = (pages.to(tl.int64) * PAGE_SIZE + positions % PAGE_SIZE) * TOKEN_STRIDE
        coming = positions + BLOCK_N
        pages = tl.load(table + coming // PAGE_SIZE, mask=coming < context_len, other=0)
        key_mask = is_dim[:, None]
        value_mask = is_dim[None, :]
        if MASKED:
            # What lies behind the context may be anything, NaN too, and 0 * NaN is NaN.
            key_mask = key_mask & (positions < context_len)[None, :]
            value_mask = value_mask & (positions < context_len)[:, None]
        k = tl.load(keys + slots[None, :] + offs_d[:, None], mask=key_mask, other=0.0)
        v = tl.load(values + slots[:, None] + offs_d[None, :], mask=value_mask, other=0.0)
        scores = tl.dot(q, k, input_precision="tf32x3") * scale
        if MASKED:
            scores = tl.where(positions[None, :] <= row_positions[:, None], scores, float("-inf"))
        raised = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - raised[:, None])
        shrink = tl.exp2(highest - raised)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="tf32x3")
        highest = raised
    return highest, total, acc
