"""Attention by the flash-attn package: whole prompts as they come, chunks and decodes from their pages.

The package reads pages of 256 tokens, so that blocks, and with them the prefixes that can be found again, are
that large here.  Method: Dao 2023 (FlashAttention-2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from llm_service.attention.base import AttentionMetadata
from llm_service.attention.packed_numbers import PackedNumbers
from llm_service.kv_cache import LayerCache

PAGE_SIZE = 256

Rows = slice | torch.Tensor  # of the step's tokens; a tensor is int64


@dataclass(frozen=True)
class FlashKernels:
    """flash_attn_varlen_func and flash_attn_with_kvcache, or functions that mean the same."""

    varlen: Callable[..., torch.Tensor]
    with_kvcache: Callable[..., torch.Tensor]

    @classmethod
    def installed(cls) -> FlashKernels:
        """Those of the package."""
        # Imported here, so that this module can be used with other kernels where the package is missing.
        from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

        return cls(flash_attn_varlen_func, flash_attn_with_kvcache)


@dataclass(frozen=True)
class _Prompts:
    """Whole prompts: their keys and values are the step's own."""

    rows: Rows
    starts: torch.Tensor  # [num_prompts + 1] int32
    max_len: int


@dataclass(frozen=True)
class _Chunks:
    """Several tokens each, behind a history that is in the cache."""

    rows: Rows
    query_starts: torch.Tensor  # [num_chunks + 1] int32
    context_starts: torch.Tensor  # [num_chunks + 1] int32
    block_tables: torch.Tensor  # [num_chunks, max_blocks] int32
    max_query_len: int
    max_context_len: int


@dataclass(frozen=True)
class _Decodes:
    rows: Rows
    block_tables: torch.Tensor  # [batch, max_blocks] int32
    context_lens: torch.Tensor  # [batch] int32


@dataclass(frozen=True)
class FlashPlan:
    slot_mapping: torch.Tensor  # [num_tokens] int64
    prompts: _Prompts | None
    chunks: _Chunks | None
    decodes: _Decodes | None


class FlashBackend:
    """Holds nothing but the kernels."""

    name = "flash-attn"
    block_size = PAGE_SIZE
    supports_graphs = True

    def __init__(self, kernels: FlashKernels) -> None:
        self._kernels = kernels

    def warm_up(self, num_heads: int, cache: LayerCache, max_query_len: int) -> None:
        """See AttentionBackend.warm_up.  Kernels come compiled; they are loaded when they first run.

        Raises:
            ValueError: the installed package has no kernel for this model on this GPU.
        """
        try:
            for query_len, context_len in ((1, 1), (2, 2), (2, 3)):
                if query_len <= max_query_len:
                    self._run_on_zeros(num_heads, cache, query_len, context_len)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"attention backend 'flash-attn' cannot serve this model: {reason}") from error

    def plan(self, metadata: AttentionMetadata, device: torch.device) -> FlashPlan:
        """Sort the step's sequences by kernel; one copy to the device holds their numbers."""
        prompts, chunks, decodes = _by_kernel(metadata)
        numbers = PackedNumbers()
        if prompts:
            numbers.add(_starts(metadata.query_lens, prompts))
        if chunks:
            numbers.add(_starts(metadata.query_lens, chunks))
            numbers.add(_starts(metadata.context_lens, chunks))
            numbers.add_rows([_blocks(metadata, i) for i in chunks])
        if decodes:
            numbers.add_rows([_blocks(metadata, i) for i in decodes])
            numbers.add([metadata.context_lens[i] for i in decodes])
        sections = iter(numbers.to(device))
        return FlashPlan(
            slot_mapping=metadata.slot_mapping.to(device, non_blocking=True),
            prompts=_prompts(metadata, prompts, sections) if prompts else None,
            chunks=_chunks(metadata, chunks, sections) if chunks else None,
            decodes=_decodes(metadata, decodes, sections) if decodes else None,
        )

    def plan_decode(
        self, slot_mapping: torch.Tensor, block_tables: torch.Tensor, context_lens: torch.Tensor
    ) -> FlashPlan:
        """See AttentionBackend.plan_decode."""
        everything = slice(0, len(context_lens))
        return FlashPlan(slot_mapping, None, None, _Decodes(everything, block_tables, context_lens))

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cache: LayerCache, plan: FlashPlan
    ) -> torch.Tensor:
        """See AttentionBackend.forward."""
        cache.write(key, value, plan.slot_mapping)
        return self.attend(query, key, value, cache, plan)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cache: LayerCache, plan: FlashPlan
    ) -> torch.Tensor:
        """See AttentionBackend.attend."""
        parts = list(self._parts(query, key, value, cache, plan))
        if len(parts) == 1:
            return parts[0][1]
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for rows, attended in parts:
            output[rows] = attended
        return output

    def _parts(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cache: LayerCache, plan: FlashPlan
    ) -> Iterator[tuple[Rows, torch.Tensor]]:
        """Rows of the step and what they attended to: one launch a kind of sequence."""
        if (prompts := plan.prompts) is not None:
            rows, starts, longest = prompts.rows, prompts.starts, prompts.max_len
            fresh = query[rows], key[rows], value[rows]
            yield rows, self._kernels.varlen(*fresh, starts, starts, longest, longest, causal=True)
        if (chunks := plan.chunks) is not None:
            # Of a chunk the last token is the context's last: the package aligns bottom-right, too.
            yield (
                chunks.rows,
                self._kernels.varlen(
                    query[chunks.rows],
                    cache.key,
                    cache.value,
                    chunks.query_starts,
                    chunks.context_starts,
                    chunks.max_query_len,
                    chunks.max_context_len,
                    causal=True,
                    block_table=chunks.block_tables,
                ),
            )
        if (decodes := plan.decodes) is not None:
            yield decodes.rows, self._decode(query[decodes.rows], cache, decodes)

    def _decode(self, query: torch.Tensor, cache: LayerCache, decodes: _Decodes) -> torch.Tensor:
        """[batch, num_heads, head_dim]; a sequence without a context gets zeros."""
        return self._kernels.with_kvcache(
            query.unsqueeze(1),
            cache.key,
            cache.value,
            cache_seqlens=decodes.context_lens,
            block_table=decodes.block_tables,
            causal=True,
        ).squeeze(1)

    def _run_on_zeros(self, num_heads: int, cache: LayerCache, query_len: int, context_len: int) -> None:
        """Attend to block 0, whatever is in it."""
        query = cache.key.new_zeros((query_len, num_heads, cache.key.shape[3]))
        fresh = cache.key.new_zeros((query_len, *cache.key.shape[2:]))
        slots = torch.zeros(query_len, dtype=torch.int64)
        plan = self.plan(AttentionMetadata([query_len], [context_len], [[0]], slots), cache.key.device)
        self.attend(query, fresh, fresh, cache, plan)


def _by_kernel(metadata: AttentionMetadata) -> tuple[list[int], list[int], list[int]]:
    """Numbers of the sequences that are whole prompts, later chunks, and decodes."""
    prompts: list[int] = []
    chunks: list[int] = []
    decodes: list[int] = []
    for i, (query_len, context_len) in enumerate(
        zip(metadata.query_lens, metadata.context_lens, strict=True)
    ):
        (decodes if query_len == 1 else prompts if query_len == context_len else chunks).append(i)
    return prompts, chunks, decodes


def _prompts(metadata: AttentionMetadata, members: list[int], sections: Iterator[torch.Tensor]) -> _Prompts:
    starts = next(sections)
    longest = max(metadata.query_lens[i] for i in members)
    return _Prompts(_rows(metadata, members, starts.device), starts, longest)


def _chunks(metadata: AttentionMetadata, members: list[int], sections: Iterator[torch.Tensor]) -> _Chunks:
    query_starts, context_starts, block_tables = next(sections), next(sections), next(sections)
    return _Chunks(
        _rows(metadata, members, query_starts.device),
        query_starts,
        context_starts,
        block_tables,
        max(metadata.query_lens[i] for i in members),
        max(metadata.context_lens[i] for i in members),
    )


def _decodes(metadata: AttentionMetadata, members: list[int], sections: Iterator[torch.Tensor]) -> _Decodes:
    block_tables, context_lens = next(sections), next(sections)
    return _Decodes(_rows(metadata, members, context_lens.device), block_tables, context_lens)


def _rows(metadata: AttentionMetadata, members: list[int], device: torch.device) -> Rows:
    """Of the members' tokens; a slice when they follow one another, so that they need no gather."""
    starts = list(accumulate(metadata.query_lens, initial=0))
    spans = [(starts[i], starts[i + 1]) for i in members]
    if all(end == start for (_, end), (start, _) in pairwise(spans)):
        return slice(spans[0][0], spans[-1][1])
    rows = torch.cat([torch.arange(start, end) for start, end in spans])
    return (rows.pin_memory() if device.type == "cuda" else rows).to(device, non_blocking=True)


def _starts(lens: list[int], members: list[int]) -> list[int]:
    return list(accumulate((lens[i] for i in members), initial=0))


def _blocks(metadata: AttentionMetadata, i: int) -> list[int]:
    """The blocks that hold sequence i's context."""
    return metadata.block_tables[i][: -(-metadata.context_lens[i] // PAGE_SIZE)]
