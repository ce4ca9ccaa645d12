"""Products to measure: InternVL3-8B's shapes, with weights enough that none is in a cache at its turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from llm_service.kernels.linear_config import MAX_TILED_ROWS, Config, candidates, float8_candidates
from llm_service.kernels.linear_table import configuration, float8_configuration
from llm_service.model.config import DecoderConfig
from llm_service.model.float8 import FLOAT8, dequantize, quantize_rows
from llm_service.model.rope import RopeConfig
from llm_service.stopwatch import seconds_or_none

COLD_BYTES = 400 << 20  # weights a measurement rotates over: several times the L2 cache
MODEL = DecoderConfig(
    hidden_size=3584,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    intermediate_size=18944,
    vocab_size=151674,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    qkv_bias=True,
    o_bias=False,
    mlp_bias=False,
    qk_norm=False,
    rope=RopeConfig(1e6),
    max_position_embeddings=32768,
)
SHAPES = {
    "qkv": (4608, 3584, True),
    "o": (3584, 3584, False),
    "gate_up": (37888, 3584, False),
    "down": (3584, 18944, False),
    "lm_head": (151680, 3584, False),
}

# x, weight, bias, scale
Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A product to measure: `rows` rows of x, W [n, k]."""

    rows: int
    n: int
    k: int
    with_bias: bool
    float8: bool

    @property
    def weight_bytes(self) -> int:
        """Of one element of W."""
        return 1 if self.float8 else 2

    def candidates(self) -> Iterator[Config]:
        return (float8_candidates if self.float8 else candidates)(self.rows, self.n, self.k)

    def by(self) -> str:
        """What the engine computes it by."""
        if self.rows > MAX_TILED_ROWS:
            return "_scaled_mm" if self.float8 else "cuBLAS"
        if self.float8:
            return str(float8_configuration(self.rows, self.n, self.k) or "_scaled_mm")
        return str(configuration(self.rows, self.n, self.k) or "cuBLAS")


@dataclass(frozen=True)
class Operands:
    """One product's rows, and weights enough that none is in the cache when its turn comes."""

    x: torch.Tensor
    weights: list[torch.Tensor]
    bias: torch.Tensor | None
    scales: list[torch.Tensor | None]  # where the weights are in float8

    @classmethod
    def of(cls, case: Case, cold: bool = True) -> Operands:
        n, k = case.n, case.k
        copies = max(2, -(-COLD_BYTES // (case.weight_bytes * n * k))) if cold else 1
        weights = [random_bf16(n, k) * k**-0.5 for _ in range(copies)]
        scales: list[torch.Tensor | None] = [None] * copies
        if case.float8:
            pairs = [quantized(weight) for weight in weights]
            weights, scales = [values for values, _ in pairs], [scale for _, scale in pairs]
        return cls(random_bf16(case.rows, k), weights, random_bf16(n) if case.with_bias else None, scales)

    def us_or_none(self, product: Product) -> float | None:
        """Microseconds of one product, over at least 16 of them; None where the GPU is too small for it."""
        rounds = -(-16 // len(self.weights))
        weights = list(zip(self.weights, self.scales, strict=True)) * rounds
        seconds = seconds_or_none(
            [partial(product, self.x, weight, self.bias, scale) for weight, scale in weights]
        )
        return None if seconds is None else 1e6 * seconds

    def us(self, product: Product) -> float:
        """As us_or_none, of what fits."""
        us = self.us_or_none(product)
        assert us is not None
        return us

    def in_bf16(self) -> Operands:
        """The same product with weights of 16 bits."""
        weights = [
            weight if scale is None else dequantize(weight, scale, torch.bfloat16)
            for weight, scale in zip(self.weights, self.scales, strict=True)
        ]
        return Operands(self.x, weights, self.bias, [None] * len(weights))

    @property
    def num_bytes(self) -> int:
        """Read and written by one product."""
        n = self.weights[0].shape[0]
        return self.weights[0].nbytes + 2 * (self.x.numel() + len(self.x) * n)


def random_bf16(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, scale = torch.empty_like(weight, dtype=FLOAT8), weight.new_empty(len(weight), dtype=torch.float32)
    quantize_rows(weight, values, scale)
    return values, scale


def cublas(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, _: torch.Tensor | None
) -> torch.Tensor:
    return F.linear(x, weight, bias)
