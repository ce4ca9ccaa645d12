"""What the decoder computes besides attention, as a protocol; PyTorch's operators are its reference.

The choice is made once, by device. Knows neither layers nor checkpoints.
"""

from __future__ import annotations

import logging
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from llm_service.kv_cache import LayerCache
from llm_service.model.float8 import Float8Rows, dequantize
from llm_service.model.rope import RotaryTable, rotate

log = logging.getLogger(__name__)

Rows = torch.Tensor | Float8Rows  # [num_rows, size]; rounded only for the product that follows


class Ops(Protocol):
    """The decoder's operations on one kind of device."""

    name: str

    def linear(
        self,
        x: Rows,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[num_rows, in] x [out, in] (+ [out]) -> [num_rows, out].

        With `scale` [out], fp32, the weight is in float8 and a row of it stands for scale times its values;
        x may then be rounded to float8 likewise.
        """

    def rms_norm(self, hidden: torch.Tensor, weight: torch.Tensor, eps: float, float8: bool = False) -> Rows:
        """Of the last dimension, in Llama's order: fp32, cast, times the weight.

        With `float8`, here and below, a product with a float8 matrix follows and the result may be rounded.
        """

    def add_rms_norm(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        float8: bool = False,
    ) -> tuple[Rows, torch.Tensor]:
        """The norm of hidden + residual, and that sum."""

    def silu_mul(self, gate_up: torch.Tensor, float8: bool = False) -> Rows:
        """[num_rows, 2 * size], gate first -> silu(gate) * up."""

    def rotation(self, table: RotaryTable, positions: torch.Tensor) -> Any:
        """What rotate_and_cache() needs of this step's positions [num_tokens], for all layers."""

    def rotate_and_cache(
        self,
        qkv: torch.Tensor,  # [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]
        rotation: Any,
        norm: torch.Tensor | None,  # [num_heads + num_kv_heads, head_dim]: weights of the heads' RMSNorm
        eps: float,
        cache: LayerCache,
        slots: torch.Tensor,  # [num_tokens] int64
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Normalise and rotate queries and keys; store keys and values at `slots`; return all three,
        [num_tokens, num_heads or num_kv_heads, head_dim]."""

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        """[num_rows, vocab_size] -> [num_rows] int64."""


class TorchOps:
    """On any device; what other implementations are tested against."""

    name = "torch"

    def linear(
        self,
        x: Rows,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See Ops.linear; x is never rounded."""
        assert isinstance(x, torch.Tensor)
        if scale is not None:
            weight = dequantize(weight, scale, x.dtype)
        return F.linear(x, weight, bias)

    def rms_norm(
        self, hidden: torch.Tensor, weight: torch.Tensor, eps: float, float8: bool = False
    ) -> torch.Tensor:
        """See Ops.rms_norm."""
        # The weight apart: F.rms_norm would multiply by it before the cast.
        return F.rms_norm(hidden, hidden.shape[-1:], None, eps) * weight

    def add_rms_norm(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        float8: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See Ops.add_rms_norm."""
        total = residual + hidden
        return self.rms_norm(total, weight, eps), total

    def silu_mul(self, gate_up: torch.Tensor, float8: bool = False) -> torch.Tensor:
        """See Ops.silu_mul."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def rotation(self, table: RotaryTable, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of the positions."""
        cos, sin = table(positions)
        return cos, sin

    def rotate_and_cache(
        self,
        qkv: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        norm: torch.Tensor | None,
        eps: float,
        cache: LayerCache,
        slots: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See Ops.rotate_and_cache."""
        num_kv_heads, head_dim = cache.key.shape[2:]
        heads = qkv.view(qkv.shape[0], -1, head_dim)
        num_rotated = heads.shape[1] - num_kv_heads
        # Queries and keys lie side by side, so that one call normalises and rotates both.
        rotated = heads[:, :num_rotated]
        if norm is not None:
            rotated = self.rms_norm(rotated, norm, eps)
        rotated = rotate(rotated, *rotation)
        query, key = rotated[:, :-num_kv_heads], rotated[:, -num_kv_heads:]
        value = heads[:, num_rotated:]
        cache.write(key, value, slots)
        return query, key, value

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        """See Ops.argmax."""
        return logits.argmax(dim=-1)


TORCH_OPS = TorchOps()


def select_ops(device: torch.device) -> Ops:
    """Triton's on a CUDA device, else PyTorch's; the choice and its reason are logged."""
    if device.type != "cuda":
        log.info("decoder kernels: torch (the device is %s)", device.type)
        return TORCH_OPS
    # Imported here, so that Triton is never imported where it cannot run.
    from llm_service.kernels.triton_ops import TritonOps

    # Measured on an H200: a step of 28 layers at batch 1 takes 3.51 ms with overlap and 3.68 ms without.
    overlap = torch.cuda.get_device_capability(device) >= (9, 0)
    log.info("decoder kernels: triton (the device is %s)", torch.cuda.get_device_name(device))
    return TritonOps(device, overlap)
