"""Attention for CUDA: a step's decodes in one Triton launch, its chunks in another, long prompts by cuDNN.

Decode plans hold device tensors only, so that a captured CUDA graph serves any contexts.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, islice

import torch

from llm_service.attention.base import AttentionMetadata
from llm_service.attention.cudnn_prefill import CudnnPrefill
from llm_service.attention.packed_numbers import PackedNumbers
from llm_service.attention.triton_decode import new_counters, paged_decode
from llm_service.attention.triton_prefill import (
    LONG_CHUNK,
    TILE_FIELDS,
    choose_tile,
    cut_tiles,
    paged_prefill,
)
from llm_service.kv_cache import LayerCache

BLOCK_SIZE = 16


@dataclass(frozen=True)
class _Decodes:
    rows: torch.Tensor  # [batch] int32: of the step's tokens
    block_tables: torch.Tensor  # [batch, max_blocks] int32
    context_lens: torch.Tensor  # [batch] int32


@dataclass(frozen=True)
class _Chunks:
    tiles: torch.Tensor  # [num_tiles, TILE_FIELDS] int32
    block_tables: torch.Tensor  # [num_chunks, max_blocks] int32
    tile: int  # query rows a tile


@dataclass(frozen=True)
class _Prompt:
    """A prompt, or its last chunk, that cuDNN takes."""

    rows: slice
    padded_len: int
    history: torch.Tensor  # [num_tokens_before] int32: their slots


@dataclass(frozen=True)
class CudaPlan:
    slot_mapping: torch.Tensor  # [num_tokens] int64
    chunks: _Chunks | None
    decodes: _Decodes | None
    prompts: tuple[_Prompt, ...]


class CudaBackend:
    """Keeps counters and buffers that its launches share: use it from one thread and one stream."""

    name = "cuda"
    block_size = BLOCK_SIZE
    supports_graphs = True

    def __init__(self, device: torch.device) -> None:
        self._counters = new_counters(device)
        self._cudnn = CudnnPrefill()

    def warm_up(self, num_heads: int, cache: LayerCache, max_query_len: int) -> None:
        """See AttentionBackend.warm_up."""
        self._cudnn.warm_up(num_heads, cache.key, max_query_len)
        head_dim = cache.key.shape[3]
        for query_len in (1, 2, LONG_CHUNK + 1):
            if query_len > max_query_len:
                continue
            query = cache.key.new_zeros((query_len, num_heads, head_dim))
            fresh = cache.key.new_zeros((query_len, *cache.key.shape[2:]))
            slots = torch.zeros(query_len, dtype=torch.int64)
            # Block 0 stands for every block: nothing is written.
            blocks = [0] * -(-query_len // BLOCK_SIZE)
            metadata = AttentionMetadata([query_len], [query_len], [blocks], slots)
            self.attend(query, fresh, fresh, cache, self.plan(metadata, cache.key.device))

    def plan(self, metadata: AttentionMetadata, device: torch.device) -> CudaPlan:
        """Sort the step's sequences by kernel; one copy to the device holds all their numbers."""
        starts = _starts(metadata)
        decodes: list[int] = []
        chunks: list[int] = []
        prompts: list[tuple[int, int]] = []  # and their padded lengths
        for i, query_len in enumerate(metadata.query_lens):
            padded_len = self._cudnn.padded_len(query_len, metadata.context_lens[i])
            if query_len == 1:
                decodes.append(i)
            elif padded_len is None:
                chunks.append(i)
            else:
                prompts.append((i, padded_len))
        numbers = PackedNumbers()
        tile = _add_chunks(numbers, metadata, chunks, starts) if chunks else 0
        if decodes:
            _add_decodes(numbers, metadata, decodes, starts)
        for i, _ in prompts:
            numbers.add(_history(metadata, i))
        sections = iter(numbers.to(device))
        return CudaPlan(
            slot_mapping=metadata.slot_mapping.to(device, non_blocking=True),
            chunks=_Chunks(next(sections), next(sections), tile) if chunks else None,
            decodes=_Decodes(next(sections), next(sections), next(sections)) if decodes else None,
            prompts=tuple(
                _Prompt(slice(starts[i], starts[i] + metadata.query_lens[i]), padded_len, next(sections))
                for i, padded_len in prompts
            ),
        )

    def plan_decode(
        self, slot_mapping: torch.Tensor, block_tables: torch.Tensor, context_lens: torch.Tensor
    ) -> CudaPlan:
        """See AttentionBackend.plan_decode."""
        rows = torch.arange(len(context_lens), dtype=torch.int32, device=context_lens.device)
        return CudaPlan(slot_mapping, None, _Decodes(rows, block_tables, context_lens), ())

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cache: LayerCache, plan: CudaPlan
    ) -> torch.Tensor:
        """See AttentionBackend.forward."""
        cache.write(key, value, plan.slot_mapping)
        return self.attend(query, key, value, cache, plan)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cache: LayerCache, plan: CudaPlan
    ) -> torch.Tensor:
        """See AttentionBackend.attend."""
        if len(plan.prompts) == 1 and plan.decodes is None and plan.chunks is None:
            prompt = plan.prompts[0]
            return self._cudnn.attend(query, key, value, prompt.padded_len, cache, prompt.history)
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for prompt in plan.prompts:
            rows = prompt.rows
            output[rows] = self._cudnn.attend(
                query[rows], key[rows], value[rows], prompt.padded_len, cache, prompt.history
            )
        if plan.chunks is not None:
            chunks = plan.chunks
            paged_prefill(query, cache, chunks.tiles, chunks.block_tables, output, chunks.tile)
        if plan.decodes is not None:
            decodes = plan.decodes
            paged_decode(
                query,
                cache,
                decodes.rows,
                decodes.block_tables,
                decodes.context_lens,
                output,
                self._counters,
            )
        return output


def _blocks(metadata: AttentionMetadata, i: int) -> list[int]:
    """The blocks that hold sequence i's context."""
    return metadata.block_tables[i][: -(-metadata.context_lens[i] // BLOCK_SIZE)]


def _history(metadata: AttentionMetadata, i: int) -> list[int]:
    """The slots of what sequence i has in the cache already."""
    num_tokens = metadata.context_lens[i] - metadata.query_lens[i]
    blocks = metadata.block_tables[i][: -(-num_tokens // BLOCK_SIZE)]
    slots = (block * BLOCK_SIZE + offset for block in blocks for offset in range(BLOCK_SIZE))
    return list(islice(slots, num_tokens))


def _starts(metadata: AttentionMetadata) -> list[int]:
    return list(accumulate(metadata.query_lens, initial=0))


def _add_decodes(
    numbers: PackedNumbers, metadata: AttentionMetadata, members: list[int], starts: list[int]
) -> None:
    """The sections of _Decodes, in its order."""
    numbers.add([starts[i] for i in members])
    numbers.add_rows([_blocks(metadata, i) for i in members])
    numbers.add([metadata.context_lens[i] for i in members])


def _add_chunks(
    numbers: PackedNumbers, metadata: AttentionMetadata, members: list[int], starts: list[int]
) -> int:
    """The first two sections of _Chunks, in its order; returns the third."""
    query_lens = [metadata.query_lens[i] for i in members]
    context_lens = [metadata.context_lens[i] for i in members]
    tile = choose_tile(max(query_lens))
    records = cut_tiles([starts[i] for i in members], query_lens, context_lens, tile)
    numbers.add(records, len(records) // TILE_FIELDS, TILE_FIELDS)
    numbers.add_rows([_blocks(metadata, i) for i in members])
    return tile
