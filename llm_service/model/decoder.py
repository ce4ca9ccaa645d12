"""One decoder for every dense family InternVL pairs with: pre-norm blocks, grouped-query attention, SwiGLU.

Reads architecture facts; knows neither families, checkpoints, nor what a sequence is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from llm_service.attention.base import AttentionBackend
from llm_service.kv_cache import KVCache, LayerCache
from llm_service.model.config import DecoderConfig
from llm_service.model.layers import (
    GateUpLinear,
    HeadNorm,
    Linear,
    QKVLinear,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
)
from llm_service.model.rope import RotaryTable, rotate
from llm_service.parallel import TensorParallel


class Attention(nn.Module):
    def __init__(
        self,
        config: DecoderConfig,
        parallel: TensorParallel,
        backend: AttentionBackend,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.backend = backend
        size, head_dim = config.hidden_size, config.head_dim
        self.qkv = QKVLinear(
            size,
            config.num_heads,
            config.num_kv_heads,
            head_dim,
            bias=config.qkv_bias,
            parallel=parallel,
            dtype=dtype,
            device=device,
        )
        num_heads, num_kv_heads = self.qkv.num_heads, self.qkv.num_kv_heads
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.qk_norm: HeadNorm | None = None
        if config.qk_norm:
            eps = config.rms_norm_eps
            self.qk_norm = HeadNorm(num_heads, num_kv_heads, head_dim, eps, dtype, device)
        self.o = RowParallelLinear(
            config.num_heads * head_dim,
            size,
            bias=config.o_bias,
            parallel=parallel,
            dtype=dtype,
            device=device,
        )

    def forward(
        self,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cache: LayerCache,
        plan: Any,
    ) -> torch.Tensor:
        qkv = self.qkv(hidden).view(hidden.shape[0], -1, self.head_dim)
        num_heads, num_rotated = self.num_heads, self.num_heads + self.num_kv_heads
        # Queries and keys lie side by side, so that one call normalises and rotates both.
        heads = qkv[:, :num_rotated]  # [num_tokens, num_heads + num_kv_heads, head_dim]
        if self.qk_norm is not None:
            heads = self.qk_norm(heads)
        heads = rotate(heads, cos, sin)
        attended = self.backend.forward(
            heads[:, :num_heads], heads[:, num_heads:], qkv[:, num_rotated:], cache, plan
        )
        output: torch.Tensor = self.o(attended.flatten(1))
        return output


class MLP(nn.Module):
    def __init__(
        self,
        config: DecoderConfig,
        parallel: TensorParallel,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.gate_up = GateUpLinear(
            config.hidden_size,
            config.intermediate_size,
            bias=config.mlp_bias,
            parallel=parallel,
            dtype=dtype,
            device=device,
        )
        self.down = RowParallelLinear(
            config.intermediate_size,
            config.hidden_size,
            bias=config.mlp_bias,
            parallel=parallel,
            dtype=dtype,
            device=device,
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(hidden).chunk(2, dim=-1)
        output: torch.Tensor = self.down(F.silu(gate).mul_(up))
        return output


class DecoderLayer(nn.Module):
    def __init__(
        self,
        config: DecoderConfig,
        parallel: TensorParallel,
        backend: AttentionBackend,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.attention_norm = RMSNorm(size, eps=eps, dtype=dtype, device=device)
        self.attention = Attention(config, parallel, backend, dtype, device)
        self.mlp_norm = RMSNorm(size, eps=eps, dtype=dtype, device=device)
        self.mlp = MLP(config, parallel, dtype, device)

    def forward(
        self,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cache: LayerCache,
        plan: Any,
    ) -> torch.Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden), cos, sin, cache, plan)
        output: torch.Tensor = hidden + self.mlp(self.mlp_norm(hidden))
        return output


class Decoder(nn.Module):
    """One rank's share of the language model; run it under torch.inference_mode()."""

    def __init__(
        self,
        config: DecoderConfig,
        parallel: TensorParallel,
        backend: AttentionBackend,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Weights are uninitialised; weights.load_decoder fills them."""
        super().__init__()
        self.config = config
        self.embedding = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, parallel=parallel, dtype=dtype, device=device
        )
        self.rope = RotaryTable(config.rope, config.head_dim, config.max_position_embeddings, dtype, device)
        self.layers = nn.ModuleList(
            DecoderLayer(config, parallel, backend, dtype, device) for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype, device=device)
        self.head = VocabParallelHead(
            config.hidden_size, config.vocab_size, parallel=parallel, dtype=dtype, device=device
        )

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[num_tokens] int64 -> [num_tokens, hidden_size]."""
        embeds: torch.Tensor = self.embedding(token_ids)
        return embeds

    def forward(
        self, hidden: torch.Tensor, positions: torch.Tensor, kv_cache: KVCache, plan: Any
    ) -> torch.Tensor:
        """Embeddings [num_tokens, hidden_size] and their positions -> hidden states after the final norm.

        `plan` comes from the backend's plan(); every token's keys and values enter `kv_cache`.
        """
        cos, sin = self.rope(positions)
        for layer, cache in zip(self.layers, kv_cache.layers, strict=True):
            hidden = layer(hidden, cos, sin, cache, plan)
        output: torch.Tensor = self.norm(hidden)
        return output

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_rows, hidden_size] after the final norm -> float32 [num_rows, vocab_size]."""
        logits: torch.Tensor = self.head(hidden)
        return logits.float()

    def tie_head(self) -> None:
        """Let the output matrix be the embedding."""
        self.head.weight = self.embedding.weight

    def pack(self) -> None:
        """Reorder matrices for this machine; call once, when all weights are in."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack(keep_weight=module.weight is self.embedding.weight)
