"""Rotary position embedding (Su et al. 2021): scaling kinds as numbers, and the table of cosines and sines.

Positions beyond the table do not exist: the context is capped at its length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

KINDS = ("default", "dynamic", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class RopeConfig:
    """Frequencies of the rotation; fields beyond `theta` belong to some kinds only.

    "dynamic" (NTK) equals "default" up to max_position_embeddings, where the context is capped.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0  # linear, llama3, yarn
    original_max_positions: int = 0  # llama3, yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the ramp's ends to whole dimensions
    attention_factor: float = 1.0  # yarn: multiplies cosines and sines

    def inverse_frequencies(self, head_dim: int) -> torch.Tensor:
        """[head_dim / 2] fp32 on the CPU, in transformers' order of operations."""
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
        plain = 1.0 / (self.theta**exponents)
        if self.kind == "linear":
            return plain / self.factor
        if self.kind == "llama3":
            return self._llama3(plain)
        if self.kind == "yarn":
            return self._yarn(plain)
        return plain

    def _llama3(self, plain: torch.Tensor) -> torch.Tensor:
        """Llama 3.1: long wavelengths divided by factor, short ones kept, a blend between."""
        wavelengths = 2 * math.pi / plain
        smooth = (self.original_max_positions / wavelengths - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        blend = (1 - smooth) * plain / self.factor + smooth * plain
        is_long = wavelengths > self.original_max_positions / self.low_freq_factor
        is_short = wavelengths < self.original_max_positions / self.high_freq_factor
        return torch.where(is_long, plain / self.factor, torch.where(is_short, plain, blend))

    def _yarn(self, plain: torch.Tensor) -> torch.Tensor:
        """YaRN (Peng et al. 2023): a linear ramp over dimensions from kept to divided by factor."""
        head_dim = 2 * len(plain)

        def dimension(rotations: float) -> float:
            ratio = self.original_max_positions / (rotations * 2 * math.pi)
            return head_dim * math.log(ratio) / (2 * math.log(self.theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        span = high - low if high > low else 0.001
        ramp = ((torch.arange(len(plain), dtype=torch.float) - low) / span).clamp(0, 1)
        return plain / self.factor * ramp + plain * (1 - ramp)


class RotaryTable(nn.Module):
    """Cosines and sines of every position, computed in fp32 and cast to the activation dtype."""

    def __init__(
        self,
        config: RopeConfig,
        head_dim: int,
        max_positions: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        frequencies = config.inverse_frequencies(head_dim).to(device)
        angles = torch.arange(max_positions, device=device).float()[:, None] * frequencies
        cos, sin = angles.cos() * config.attention_factor, angles.sin() * config.attention_factor
        # The sine carries the minus sign of rotate_half([a, b]) = [-b, a]; see rotate().
        self.register_buffer("cos", torch.cat((cos, cos), dim=-1).to(dtype)[:, None])
        self.register_buffer("sin", torch.cat((-sin, sin), dim=-1).to(dtype)[:, None])

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[num_tokens] int64 -> cosines and signed sines, [num_tokens, 1, head_dim] each."""
        return self.get_buffer("cos")[positions], self.get_buffer("sin")[positions]


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate [num_tokens, num_heads, head_dim]; bit-equal to transformers' apply_rotary_pos_emb."""
    swapped = heads.roll(heads.shape[-1] // 2, dims=-1)
    return (heads * cos).add_(swapped.mul_(sin))
