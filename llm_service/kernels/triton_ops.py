"""The decoder's operations by Triton kernels, for CUDA only; can be captured in CUDA graphs."""

from __future__ import annotations

import torch

from llm_service.kernels.argmax import argmax
from llm_service.kernels.float8 import scaled_product, silu_mul_quantize
from llm_service.kernels.fused import add_rms_norm, norm_quantize, rms_norm, rotate_and_cache, silu_mul
from llm_service.kernels.linear_config import MAX_TILED_ROWS
from llm_service.kernels.linear_small import SmallLinear
from llm_service.kernels.ops import Rows
from llm_service.kv_cache import LayerCache
from llm_service.model.float8 import Float8Rows
from llm_service.model.rope import RotaryTable

Rotation = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # table of cosines, of sines, positions


# Measured on an H200, a step of 28 layers with and without overlap: 3.5 and 3.6 ms at 1 row, 4.2 and 4.2 at
# 64, 7.3 and 6.8 at 256, where a kernel that waits takes multiprocessors from the one it waits for.
MAX_OVERLAPPED_ROWS = 64


class TritonOps:
    """For one device and one stream at a time: split products share counters.

    With `overlap`, a kernel on few rows may start while the one before still runs; it waits before it reads
    that one's output (programmatic dependent launch; Hopper and newer). Weights are read before that wait:
    whatever wrote them must have ended.
    """

    name = "triton"

    def __init__(self, device: torch.device, overlap: bool = False) -> None:
        self._launch = {"launch_pdl": True} if overlap else None
        self._linear = SmallLinear(device, self._launch)

    def linear(
        self,
        x: Rows,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See Ops.linear; x is rounded to float8 where its rows are more than MAX_TILED_ROWS."""
        if isinstance(x, Float8Rows):
            assert scale is not None
            return scaled_product(x, weight, bias, scale, torch.bfloat16)
        return self._linear(x, weight, bias, scale)

    def rms_norm(self, hidden: torch.Tensor, weight: torch.Tensor, eps: float, float8: bool = False) -> Rows:
        """See Ops.rms_norm."""
        if float8 and len(hidden) > MAX_TILED_ROWS:
            return norm_quantize(hidden, None, weight, eps)[0]
        return rms_norm(hidden, weight, eps, self._launch_for(hidden))

    def add_rms_norm(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        float8: bool = False,
    ) -> tuple[Rows, torch.Tensor]:
        """See Ops.add_rms_norm."""
        if float8 and len(hidden) > MAX_TILED_ROWS:
            return norm_quantize(hidden, residual, weight, eps)
        return add_rms_norm(hidden, residual, weight, eps, self._launch_for(hidden))

    def silu_mul(self, gate_up: torch.Tensor, float8: bool = False) -> Rows:
        """See Ops.silu_mul."""
        if float8 and len(gate_up) > MAX_TILED_ROWS:
            return silu_mul_quantize(gate_up)
        return silu_mul(gate_up, self._launch_for(gate_up))

    def rotation(self, table: RotaryTable, positions: torch.Tensor) -> Rotation:
        """The whole tables: the kernel looks the positions up."""
        return table.get_buffer("cos"), table.get_buffer("sin"), positions

    def rotate_and_cache(
        self,
        qkv: torch.Tensor,
        rotation: Rotation,
        norm: torch.Tensor | None,
        eps: float,
        cache: LayerCache,
        slots: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See Ops.rotate_and_cache; a negative slot is not written."""
        cos, sin, positions = rotation
        return rotate_and_cache(
            qkv, positions, cos, sin, norm, eps, cache.key, cache.value, slots, self._launch_for(qkv)
        )

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        """See Ops.argmax."""
        return argmax(logits)

    def _launch_for(self, rows: torch.Tensor) -> dict[str, bool] | None:
        return self._launch if len(rows) <= MAX_OVERLAPPED_ROWS else None
