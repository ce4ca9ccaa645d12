"""Tensor parallelism: who this rank is, which share of a dimension is its own, and the two collectives.

Knows torch.distributed; knows nothing about layers. With one rank every call is free.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

INIT_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class TensorParallel:
    """This process's place among the `size` ranks that hold one model together."""

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank is {self.rank}, must be in [0, {self.size})")

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Concatenate the ranks' equal-shaped tensors along the last dimension."""
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts, dim=-1)

    def share(self, count: int) -> slice:
        """This rank's part of `count` things that divide evenly."""
        if count % self.size:
            raise ValueError(f"{count} does not divide by tensor-parallel size {self.size}")
        length = count // self.size
        return slice(self.rank * length, (self.rank + 1) * length)

    def share_kv_heads(self, num_kv_heads: int) -> slice:
        """This rank's KV heads; with more ranks than heads, neighbouring ranks hold the same one."""
        if self.size <= num_kv_heads:
            return self.share(num_kv_heads)
        if self.size % num_kv_heads:
            raise ValueError(f"tensor-parallel size {self.size} does not divide by {num_kv_heads} KV heads")
        head = self.rank * num_kv_heads // self.size
        return slice(head, head + 1)

    def close(self) -> None:
        """Leave the group; no collective may follow."""
        if self.size > 1:
            dist.destroy_process_group()


def init(rank: int, size: int, init_method: str, device: torch.device) -> TensorParallel:
    """Join the group of ranks; blocks until all have come or two minutes have passed.

    `init_method` is torch.distributed's ("tcp://127.0.0.1:29500", "file:///tmp/rendezvous").
    """
    parallel = TensorParallel(rank, size)
    if size > 1:
        dist.init_process_group(
            backend="nccl" if device.type == "cuda" else "gloo",
            init_method=init_method,
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=INIT_TIMEOUT_S),
            device_id=device if device.type == "cuda" else None,
        )
    return parallel
