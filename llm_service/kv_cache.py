"""The tensors that hold keys and values, block by block; which block is whose, the block manager knows."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llm_service.model.config import DecoderConfig
from llm_service.parallel import TensorParallel


@dataclass(frozen=True)
class LayerCache:
    """One layer's keys and values; slot s is [s // block_size, s % block_size]."""

    key: torch.Tensor  # [num_blocks, block_size, num_kv_heads, head_dim]
    value: torch.Tensor  # [num_blocks, block_size, num_kv_heads, head_dim]

    def write(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        """Store [num_tokens, num_kv_heads, head_dim] at `slots` [num_tokens] int64."""
        self.key.flatten(0, 1).index_copy_(0, slots, key)
        self.value.flatten(0, 1).index_copy_(0, slots, value)


@dataclass(frozen=True)
class KVCache:
    """Every layer's cache on this rank."""

    layers: tuple[LayerCache, ...]

    @classmethod
    def allocate(
        cls,
        config: DecoderConfig,
        num_blocks: int,
        block_size: int,
        parallel: TensorParallel,
        dtype: torch.dtype,
        device: torch.device,
    ) -> KVCache:
        """Reserve `num_blocks` blocks of `block_size` tokens in every layer."""
        shape = (num_blocks, block_size, _local_kv_heads(config, parallel), config.head_dim)

        def tensor() -> torch.Tensor:
            # Zeros, not garbage: padded reads multiply masked slots by 0, and 0 * NaN is NaN.
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(tuple(LayerCache(tensor(), tensor()) for _ in range(config.num_layers)))


def bytes_per_block(
    config: DecoderConfig, block_size: int, dtype: torch.dtype, parallel: TensorParallel
) -> int:
    """Bytes that one block takes on one rank, keys and values of all layers together."""
    values = block_size * _local_kv_heads(config, parallel) * config.head_dim
    return 2 * config.num_layers * values * dtype.itemsize


def _local_kv_heads(config: DecoderConfig, parallel: TensorParallel) -> int:
    heads = parallel.share_kv_heads(config.num_kv_heads)
    return len(range(heads.start, heads.stop))
