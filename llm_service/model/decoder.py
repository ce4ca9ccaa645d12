"""One decoder for every dense family InternVL pairs with: pre-norm blocks, grouped-query attention, SwiGLU.

Reads architecture facts; knows neither families, checkpoints, nor what a sequence is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llm_service.attention.base import AttentionBackend
from llm_service.kernels.ops import TORCH_OPS, Ops, Rows, select_ops
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
from llm_service.model.rope import RotaryTable
from llm_service.parallel import TensorParallel


class Attention(nn.Module):
    ops: Ops = TORCH_OPS

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
        self.qk_norm: HeadNorm | None = None
        if config.qk_norm:
            heads = self.qkv.num_heads, self.qkv.num_kv_heads
            self.qk_norm = HeadNorm(*heads, head_dim, config.rms_norm_eps, dtype, device)
        self.o = RowParallelLinear(
            config.num_heads * head_dim,
            size,
            bias=config.o_bias,
            parallel=parallel,
            dtype=dtype,
            device=device,
        )

    def forward(self, hidden: Rows, rotation: Any, cache: LayerCache, plan: Any) -> torch.Tensor:
        norm, eps = (None, 0.0) if self.qk_norm is None else (self.qk_norm.weight, self.qk_norm.eps)
        query, key, value = self.ops.rotate_and_cache(
            self.qkv(hidden), rotation, norm, eps, cache, plan.slot_mapping
        )
        attended = self.backend.attend(query, key, value, cache, plan)
        output: torch.Tensor = self.o(attended.flatten(1))
        return output


class MLP(nn.Module):
    ops: Ops = TORCH_OPS

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

    def forward(self, hidden: Rows) -> torch.Tensor:
        inner = self.ops.silu_mul(self.gate_up(hidden), self.down.scale is not None)
        output: torch.Tensor = self.down(inner)
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

    def quantize(self) -> None:
        """Hold the four matrices in float8; call before they are filled."""
        for linear in (self.attention.qkv, self.attention.o, self.mlp.gate_up, self.mlp.down):
            linear.quantize()
        self.attention_norm.float8 = self.attention.qkv.scale is not None
        self.mlp_norm.float8 = self.mlp.gate_up.scale is not None

    def forward(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        rotation: Any,
        cache: LayerCache,
        plan: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's input is hidden + residual, and so is its output: the next norm adds them."""
        normed, residual = self.attention_norm.add(hidden, residual)
        attended = self.attention(normed, rotation, cache, plan)
        normed, residual = self.mlp_norm.add(attended, residual)
        return self.mlp(normed), residual


class Decoder(nn.Module):
    """One rank's share of the language model; run it under torch.inference_mode()."""

    ops: Ops = TORCH_OPS

    def __init__(
        self,
        config: DecoderConfig,
        parallel: TensorParallel,
        backend: AttentionBackend,
        dtype: torch.dtype,
        device: torch.device,
        quantization: str = "none",
    ) -> None:
        """Weights are uninitialised; weights.load_decoder fills them.

        With "fp8" the layers' matrices are held in float8; with "fp8-head" the output matrix, too, whose
        errors go straight into the logits. The embedding never is: a step reads a few rows of it.
        """
        super().__init__()
        self.config = config
        self.embedding = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, parallel=parallel, dtype=dtype, device=device
        )
        self.rope = RotaryTable(config.rope, config.head_dim, config.max_position_embeddings, dtype, device)
        self.layers = nn.ModuleList()
        for _ in range(config.num_layers):
            layer = DecoderLayer(config, parallel, backend, dtype, device)
            if quantization != "none":
                layer.quantize()  # each at once: never is more than one held in `dtype`
            self.layers.append(layer)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype, device=device)
        self.head = VocabParallelHead(
            config.hidden_size, config.vocab_size, parallel=parallel, dtype=dtype, device=device
        )
        if quantization == "fp8-head":
            self.head.quantize()
        self.use_ops(select_ops(device))

    def use_ops(self, ops: Ops) -> None:
        """Compute by `ops` in every part from now on."""
        for module in self.modules():
            if isinstance(module, Decoder | Attention | MLP | RMSNorm | Linear):
                module.ops = ops

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
        rotation = self.ops.rotation(self.rope, positions)
        residual: torch.Tensor | None = None
        for layer, cache in zip(self.layers, kv_cache.layers, strict=True):
            hidden, residual = layer(hidden, residual, rotation, cache, plan)
        normed, _ = self.norm.add(hidden, residual)
        assert isinstance(normed, torch.Tensor)  # only norms in front of float8 matrices round
        return normed

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_rows, hidden_size] after the final norm -> float32 [num_rows, vocab_size]."""
        logits: torch.Tensor = self.head(hidden)
        return logits.float()

    def greedy(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_rows, hidden_size] after the final norm -> the likeliest token ids, int64 [num_rows].

        The same as logits().argmax(-1), without logits in float32.
        """
        return self.ops.argmax(self.head(hidden))

    def tie_head(self) -> None:
        """Let the output matrix be the embedding: the same memory, unless the former is in float8."""
        if self.head.scale is None:
            self.head.weight = self.embedding.weight
        else:
            self.head.put("weight", self.embedding.weight)

    def pack(self) -> None:
        """Reorder matrices for this machine; call once, when all weights are in."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack(keep_weight=module.weight is self.embedding.weight)
