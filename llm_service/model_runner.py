"""Numbers of a step to tensors, forward, logits.  Holds no state of its own but the KV cache."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch

from llm_service.attention.base import AttentionBackend, AttentionMetadata
from llm_service.kv_cache import KVCache
from llm_service.messages import StepInput, VisualRows
from llm_service.model.decoder import Decoder
from llm_service.visual_memory import VisualMemory


class ModelRunner:
    """Runs on every rank with the same StepInput; logits come out whole on each of them."""

    def __init__(
        self,
        decoder: Decoder,
        kv_cache: KVCache,
        backend: AttentionBackend,
        memory: VisualMemory,
        device: torch.device,
    ) -> None:
        self._decoder = decoder
        self._kv_cache = kv_cache
        self._backend = backend
        self._memory = memory
        self._device = device

    @torch.inference_mode()
    def forward(self, step: StepInput) -> torch.Tensor:
        """Logits [len(logits_positions), vocab_size] float32, after the new keys and values are cached."""
        token_ids = torch.tensor(step.token_ids, dtype=torch.int64, device=self._device)
        positions = torch.tensor(list(_positions(step)), dtype=torch.int64, device=self._device)
        hidden = self._decoder.embed(token_ids)  # [num_tokens, hidden_size]
        for rows in step.visual_rows:
            self._insert_visual(hidden, rows)
        plan = self._backend.plan(self._metadata(step), self._device)
        hidden = self._decoder(hidden, positions, self._kv_cache, plan)
        return self._decoder.logits(hidden[step.logits_positions])

    def _insert_visual(self, hidden: torch.Tensor, rows: VisualRows) -> None:
        embeds = self._memory.rows(rows.slot, rows.first_row, rows.num_rows)
        hidden[rows.position : rows.position + rows.num_rows].copy_(embeds)

    def _metadata(self, step: StepInput) -> AttentionMetadata:
        slots = torch.tensor(list(_slots(step, self._backend.block_size)), dtype=torch.int64)
        return AttentionMetadata(
            query_lens=step.query_lens,
            context_lens=step.context_lens,
            block_tables=step.block_tables,
            slot_mapping=slots.to(self._device),
        )


def _positions(step: StepInput) -> Iterator[int]:
    lens = zip(step.query_lens, step.context_lens, strict=True)
    return chain.from_iterable(range(context - query, context) for query, context in lens)


def _slots(step: StepInput, block_size: int) -> Iterator[int]:
    """Flat cache slot of every new token."""
    for query, context, table in zip(step.query_lens, step.context_lens, step.block_tables, strict=True):
        for position in range(context - query, context):
            yield table[position // block_size] * block_size + position % block_size
