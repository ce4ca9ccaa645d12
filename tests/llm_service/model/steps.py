"""Drives a decoder over its paged cache as a model runner would: one call a step, any mix."""

from __future__ import annotations

from pathlib import Path

import torch

from llm_service.attention.base import AttentionMetadata, select_backend
from llm_service.kv_cache import KVCache
from llm_service.model.config import DecoderConfig
from llm_service.model.decoder import Decoder
from llm_service.model.rope import RopeConfig
from llm_service.model.weights import load_decoder
from llm_service.parallel import TensorParallel
from protos.checkpoint import open_checkpoint

CPU = torch.device("cpu")
QWEN3_8B = DecoderConfig(
    hidden_size=4096,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=12288,
    vocab_size=151936,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    qk_norm=True,
    rope=RopeConfig(1e6),
    max_position_embeddings=40960,
)


def load(folder: Path, parallel: TensorParallel | None = None, device: torch.device = CPU) -> Decoder:
    """The checkpoint's decoder in fp32."""
    checkpoint = open_checkpoint(str(folder))
    config = DecoderConfig.from_checkpoint(checkpoint)
    backend = select_backend("auto", device)
    parallel = parallel or TensorParallel()
    return load_decoder(checkpoint, config, parallel, backend, device, torch.float32)


class Runner:
    """Sequences by number; blocks are handed out in a scattered order, as they run out."""

    def __init__(self, decoder: Decoder, parallel: TensorParallel | None = None) -> None:
        self.decoder = decoder
        self.device = decoder.embedding.weight.device
        self.backend = select_backend("auto", self.device)
        num_blocks = 64
        self.cache = KVCache.allocate(
            decoder.config,
            num_blocks,
            self.backend.block_size,
            parallel or TensorParallel(),
            torch.float32,
            self.device,
        )
        self.free = [block * 37 % num_blocks for block in range(num_blocks)]
        self.tables: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}

    def step(self, tokens: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Feed each sequence its next token ids; logits [num_ids, vocab_size] of each."""
        slots, positions = [], []
        for sequence, ids in tokens.items():
            start = self.lengths.get(sequence, 0)
            self.lengths[sequence] = start + len(ids)
            slots += self._slots(sequence, range(start, start + len(ids)))
            positions += range(start, start + len(ids))
        metadata = AttentionMetadata(
            query_lens=[len(ids) for ids in tokens.values()],
            context_lens=[self.lengths[sequence] for sequence in tokens],
            block_tables=[self.tables[sequence] for sequence in tokens],
            slot_mapping=torch.tensor(slots),
        )
        with torch.inference_mode():
            plan = self.backend.plan(metadata, self.device)
            hidden = self.decoder.embed(torch.cat(list(tokens.values())).to(self.device))
            at = torch.tensor(positions, device=self.device)
            hidden = self.decoder(hidden, at, self.cache, plan)
            logits = self.decoder.logits(hidden).cpu()
        return dict(zip(tokens, logits.split(metadata.query_lens), strict=True))

    def _slots(self, sequence: int, positions: range) -> list[int]:
        size = self.backend.block_size
        table = self.tables.setdefault(sequence, [])
        while len(table) * size < positions.stop:
            table.append(self.free.pop())
        return [table[p // size] * size + p % size for p in positions]
