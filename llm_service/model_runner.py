"""Numbers of a step to tensors, forward, logits.  Holds no state of its own but the KV cache."""

from __future__ import annotations

import torch

from llm_service.attention.base import AttentionBackend, AttentionMetadata
from llm_service.kv_cache import KVCache
from llm_service.messages import StepInput, VisualRows
from llm_service.model.decoder import Decoder
from llm_service.step_inputs import StepTensors, TokenTable
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
        tokens: TokenTable | None = None,
    ) -> None:
        """`tokens` is needed where a step may name rows of the step before."""
        self._decoder = decoder
        self._kv_cache = kv_cache
        self._backend = backend
        self._memory = memory
        self._device = device
        self._tokens = tokens

    @torch.inference_mode()
    def forward(self, step: StepInput) -> torch.Tensor:
        """Logits [len(logits_positions), vocab_size] float32, after the new keys and values are cached."""
        return self._decoder.logits(self.hidden(step))

    @torch.inference_mode()
    def hidden(self, step: StepInput) -> torch.Tensor:
        """What the logits are made of, [len(logits_positions), hidden_size]."""
        tensors = StepTensors.of(step, self._backend.block_size, self._device, self._tokens)
        hidden = self._decoder.embed(tensors.token_ids)  # [num_tokens, hidden_size]
        for rows in step.visual_rows:
            self._insert_visual(hidden, rows)
        metadata = AttentionMetadata(
            query_lens=step.query_lens,
            context_lens=step.context_lens,
            block_tables=step.block_tables,
            slot_mapping=tensors.slot_mapping,
        )
        plan = self._backend.plan(metadata, self._device)
        hidden = self._decoder(hidden, tensors.positions, self._kv_cache, plan)
        wanted: torch.Tensor = hidden.index_select(0, tensors.logits_positions)
        return wanted

    def _insert_visual(self, hidden: torch.Tensor, rows: VisualRows) -> None:
        embeds = self._memory.rows(rows.slot, rows.first_row, rows.num_rows)
        # The engine keeps the slot from its writers until the step has ended.
        hidden[rows.position : rows.position + rows.num_rows].copy_(embeds, non_blocking=True)
