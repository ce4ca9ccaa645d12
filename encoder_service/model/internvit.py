"""InternViT: normalised tiles in, patch features out. One module for the 300M and the 6B tower.

Parameter names are those of timm's VisionTransformer. Knows nothing about checkpoints or the projector.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import LayerScale, Mlp, PatchEmbed
from torch import nn

from encoder_service.model.config import VisionConfig


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, rounded, times weight; timm's own squares in the input's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        # Without its weight F.rms_norm is exactly the fp32 part: it computes in fp32 and rounds its result.
        return self.weight * F.rms_norm(hidden, self.weight.shape, eps=self.eps)


class Attention(nn.Module):
    """Bidirectional self-attention; q and k are normalised over all heads together."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(size, 3 * size, bias=config.qkv_bias)
        self.q_norm = RMSNorm(size, config.qk_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(size, config.qk_norm_eps) if config.qk_norm else nn.Identity()
        self.proj = nn.Linear(size, size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(hidden).chunk(3, dim=-1)  # each [num_tiles, length, hidden_size]
        query, key = self.q_norm(query), self.k_norm(key)
        heads = [part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (query, key, value)]
        mixed = F.scaled_dot_product_attention(*heads)  # [num_tiles, num_heads, length, head_dim]
        output: torch.Tensor = self.proj(mixed.transpose(1, 2).flatten(-2))
        return output


class Block(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.norm1 = _block_norm(config)
        self.attn = Attention(config)
        self.ls1 = LayerScale(size, inplace=True)
        self.norm2 = _block_norm(config)
        self.mlp = Mlp(size, config.intermediate_size, act_layer=nn.GELU)
        self.ls2 = LayerScale(size, inplace=True)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.ls1(self.attn(self.norm1(hidden)))
        output: torch.Tensor = hidden + self.ls2(self.mlp(self.norm2(hidden)))
        return output


class InternViT(nn.Module):
    """The tower up to the selected layer; upstream has no norm after the last block."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.patch_embed = PatchEmbed(config.image_size, config.patch_size, embed_dim=size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.grid_size**2, size))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[num_tiles, 3, S, S] normalised -> [num_tiles, num_patches, hidden_size], row-major, no CLS."""
        patches = self.patch_embed(pixels)
        cls_token = self.cls_token.expand(len(pixels), -1, -1)
        hidden = torch.cat((cls_token, patches), dim=1) + self.pos_embed
        for block in self.blocks:
            hidden = block(hidden)
        return hidden[:, 1:]


def interpolate_position_embedding(stored: torch.Tensor, grid_size: int) -> torch.Tensor:
    """[1, 1 + stored_grid**2, hidden_size] to another grid, the CLS position first and unchanged.

    Bicubic without antialiasing, in fp32, as `InternVisionEmbeddings._get_pos_embed` does.
    """
    cls_position, patches = stored[:, :1], stored[:, 1:]
    stored_grid = round(patches.shape[1] ** 0.5)
    assert stored_grid**2 == patches.shape[1], stored.shape
    grid = patches.float().unflatten(1, (stored_grid, stored_grid)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(grid_size, grid_size), mode="bicubic", align_corners=False)
    return torch.cat((cls_position, grid.permute(0, 2, 3, 1).flatten(1, 2).to(stored.dtype)), dim=1)


def _block_norm(config: VisionConfig) -> nn.Module:
    if config.norm_type == "rms_norm":
        return RMSNorm(config.hidden_size, config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
