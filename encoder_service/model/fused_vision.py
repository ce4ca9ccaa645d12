"""The vision model's forward for a GPU: uint8 tiles in, and one kernel between two matrix products.

Imported only where there is a GPU.  Uses a VisionModel's parameters and gives what it gives, up to rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from encoder_service.model.config import VisionConfig
from encoder_service.model.fused_kernels import add_and_normalize, normalize_query_and_key, patchify
from encoder_service.model.internvit import Attention, Block, InternViT, RMSNorm
from encoder_service.model.projector import Projector, pixel_shuffle

# On Hopper cuDNN's attention reaches 296-421 TFLOP/s at the tower's shapes, FlashAttention 2 215-277.
HOPPER = (9, 0)
_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# Rows of no multiple of 16 bytes take a slow path of cuBLAS; 64 elements suit all of its kernels.
_WIDTH_MULTIPLE = 64


class FusedVision:
    """Not a module: it owns no parameters but a copy of the patch embedding's, padded."""

    def __init__(
        self, tower: InternViT, projector: Projector, config: VisionConfig, normalized: torch.Tensor
    ) -> None:
        """`normalized`: [3, 256], what each value of each channel becomes, from `normalized_values`."""
        self._tower = tower
        self._projector = projector
        self._config = config
        self._normalized = normalized
        kernel = tower.patch_embed.proj.weight.detach().flatten(1)  # [hidden_size, 3 * patch_size**2]
        self._patch_weight = F.pad(kernel, (0, -kernel.shape[1] % _WIDTH_MULTIPLE))
        self._attention_backends = _attention_backends(normalized.device)

    @torch.inference_mode()
    def forward(self, tiles: torch.Tensor, output: torch.Tensor) -> None:
        """
        Args:
            tiles: uint8 [num_tiles, 3, S, S], contiguous.
            output: [num_tiles, tokens_per_tile, output_size], contiguous; written.
        """
        with sdpa_kernel(self._attention_backends, set_priority=True):
            features = self._run_tower(tiles)
        self._project(features, output)

    def _run_tower(self, tiles: torch.Tensor) -> torch.Tensor:
        """[num_tiles, num_patches, hidden_size], row-major, no CLS"""
        hidden = self._embed(tiles)  # [num_tiles, length, hidden_size]
        rows = hidden.view(-1, hidden.shape[-1])
        branch: torch.Tensor | None = None
        scale: torch.Tensor | None = None
        for block in self._tower.blocks:
            assert isinstance(block, Block)
            normed = _normalize(rows, branch, scale, block.norm1)
            attended = self._attend(normed, block.attn, len(tiles))
            normed = _normalize(rows, attended, block.ls1.gamma, block.norm2)
            inner = F.linear(normed, block.mlp.fc1.weight, block.mlp.fc1.bias)
            torch.ops.aten.gelu_(inner)
            branch = F.linear(inner, block.mlp.fc2.weight, block.mlp.fc2.bias)
            scale = block.ls2.gamma
        if branch is not None and scale is not None:
            hidden = torch.addcmul(rows, branch, scale).view_as(hidden)
        return hidden[:, 1:]

    def _embed(self, tiles: torch.Tensor) -> torch.Tensor:
        config, tower = self._config, self._tower
        patches = patchify(tiles, self._normalized, config.patch_size, self._patch_weight.shape[1])
        embedded = F.linear(patches, self._patch_weight, tower.patch_embed.proj.bias)
        shape = (len(tiles), config.grid_size**2, config.hidden_size)
        hidden = embedded.new_empty((shape[0], 1 + shape[1], shape[2]))
        torch.add(embedded.view(shape), tower.pos_embed[:, 1:], out=hidden[:, 1:])
        torch.add(tower.cls_token, tower.pos_embed[:, :1], out=hidden[:1, :1])
        hidden[1:, :1] = hidden[:1, :1]
        return hidden

    def _attend(self, normed: torch.Tensor, attention: Attention, num_tiles: int) -> torch.Tensor:
        """[num_tiles * length, hidden_size]"""
        qkv = F.linear(normed, attention.qkv.weight, attention.qkv.bias)
        if isinstance(attention.q_norm, RMSNorm) and isinstance(attention.k_norm, RMSNorm):
            query_norm, key_norm = attention.q_norm, attention.k_norm
            normalize_query_and_key(qkv, query_norm.weight, key_norm.weight, query_norm.eps)
        query, key, value = qkv.view(
            num_tiles, -1, 3, attention.num_heads, normed.shape[1] // attention.num_heads
        ).unbind(2)
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        )
        mixed = mixed.transpose(1, 2).reshape(normed.shape)
        return F.linear(mixed, attention.proj.weight, attention.proj.bias)

    def _project(self, features: torch.Tensor, output: torch.Tensor) -> None:
        projector = self._projector
        tokens = projector.norm(pixel_shuffle(features, projector.factor, projector.ps_version)).flatten(0, 1)
        inner = F.linear(tokens, projector.fc1.weight, projector.fc1.bias)
        torch.ops.aten.gelu_(inner)
        torch.addmm(
            projector.fc2.bias, inner, projector.fc2.weight.t(), out=output.view(-1, output.shape[-1])
        )


def _normalize(
    rows: torch.Tensor, branch: torch.Tensor | None, scale: torch.Tensor | None, norm: nn.Module
) -> torch.Tensor:
    """Adds the scaled branch to `rows`, in place, and gives their norm."""
    if isinstance(norm, RMSNorm):
        return add_and_normalize(rows, branch, scale, norm.weight, None, norm.eps)
    assert isinstance(norm, nn.LayerNorm)
    return add_and_normalize(rows, branch, scale, norm.weight, norm.bias, norm.eps)


def _attention_backends(device: torch.device) -> list[SDPBackend]:
    """In the order of preference."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= HOPPER:
        return [SDPBackend.CUDNN_ATTENTION, *_BACKENDS]
    return _BACKENDS
