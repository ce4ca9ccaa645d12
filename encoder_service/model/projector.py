"""From patch features to visual tokens: pixel shuffle, then the projector. Knows nothing about the tower."""

from __future__ import annotations

import torch
from torch import nn

from encoder_service.model.config import VisionConfig


def pixel_shuffle(patches: torch.Tensor, factor: int, ps_version: str) -> torch.Tensor:
    """Join factor x factor neighbouring patches into one token.

    Args:
        patches: [num_tiles, grid_size**2, channels], row-major.
        ps_version: "v2" emits the tokens row by row; "v1" column by column, as upstream's first release did.

    Returns:
        [num_tiles, (grid_size / factor)**2, channels * factor**2]; within a token the patches are row-major.
    """
    num_tiles, num_patches, channels = patches.shape
    side = round(num_patches**0.5) // factor
    blocks = patches.view(num_tiles, side, factor, side, factor, channels)
    # dimensions: tile, block row, row in block, block column, column in block, channel
    order = (0, 1, 3, 2, 4, 5) if ps_version == "v2" else (0, 3, 1, 2, 4, 5)
    return blocks.permute(order).reshape(num_tiles, side * side, factor * factor * channels)


class Projector(nn.Module):
    """Upstream's `mlp1`. Its norm's eps is 1e-5, unlike the tower's."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.factor = config.shuffle_factor
        self.ps_version = config.ps_version
        self.norm = nn.LayerNorm(config.projector_input_size, eps=1e-5)
        self.fc1 = nn.Linear(config.projector_input_size, config.output_size)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(config.output_size, config.output_size)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """[num_tiles, num_patches, vision width] -> [num_tiles, tokens_per_tile, language-model width]"""
        tokens = pixel_shuffle(patches, self.factor, self.ps_version)
        output: torch.Tensor = self.fc2(self.act(self.fc1(self.norm(tokens))))
        return output
