"""The likeliest token of each row of logits, in two passes over many programs: Triton, for CUDA only."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 4096


@triton.jit
def _first_largest(logits, ids):  # type: ignore[no-untyped-def]
    """The largest value and the smallest id that has it; NaN counts as the largest, as in torch.argmax."""
    logits = tl.where(logits != logits, float("inf"), logits)
    largest = tl.max(logits, axis=0)
    return largest, tl.min(tl.where(logits == largest, ids, 0x7FFFFFFF), axis=0)


@triton.jit
def _block_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,  # [num_rows, vocab_size]
    largest_ptr,  # [num_rows, num_blocks] fp32
    ids_ptr,  # [num_rows, num_blocks] int32
    row_stride,
    vocab_size,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    mask = ids < vocab_size
    logits = tl.load(logits_ptr + row * row_stride + ids, mask=mask, other=float("-inf")).to(tl.float32)
    largest, first = _first_largest(logits, ids)
    at = row * tl.num_programs(1) + block
    tl.store(largest_ptr + at, largest)
    tl.store(ids_ptr + at, first)


@triton.jit
def _row_kernel(  # type: ignore[no-untyped-def]
    largest_ptr,  # [num_rows, num_blocks] fp32
    ids_ptr,  # [num_rows, num_blocks] int32
    output_ptr,  # [num_rows] int64
    num_blocks,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    mask = block < num_blocks
    largest = tl.load(largest_ptr + row * num_blocks + block, mask=mask, other=float("-inf"))
    ids = tl.load(ids_ptr + row * num_blocks + block, mask=mask, other=0x7FFFFFFF)
    _, first = _first_largest(largest, ids)
    tl.store(output_ptr + row, first.to(tl.int64))


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """[num_rows, vocab_size], columns contiguous -> [num_rows] int64; of equal ones the lowest id."""
    assert logits.stride(1) == 1
    num_rows, vocab_size = logits.shape
    num_blocks = triton.cdiv(vocab_size, BLOCK)
    largest = torch.empty(num_rows, num_blocks, dtype=torch.float32, device=logits.device)
    ids = torch.empty(num_rows, num_blocks, dtype=torch.int32, device=logits.device)
    output = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    _block_kernel[(num_rows, num_blocks)](logits, largest, ids, logits.stride(0), vocab_size, BLOCK=BLOCK)
    _row_kernel[(num_rows,)](largest, ids, output, num_blocks, BLOCKS=triton.next_power_of_2(num_blocks))
    return output
