"""What the decoder asks of attention: write this step's keys and values, attend causally to the cache.

One file a backend; the choice is made once, at start.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from llm_service.config import ATTENTION_BACKENDS
from llm_service.kv_cache import LayerCache

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AttentionMetadata:
    """One step's batch, sequence after sequence; decodes (query_len 1) and prefill chunks may mix.

    The last token of a chunk is the sequence's last in the cache: attention is aligned bottom-right.
    """

    query_lens: list[int]  # tokens of each sequence in this step
    context_lens: list[int]  # tokens of each sequence in the cache after this step
    block_tables: list[list[int]]  # block ids of each sequence, enough for its context
    slot_mapping: torch.Tensor  # [num_tokens] int64: block * block_size + offset of each token


class AttentionBackend(Protocol):
    """How keys and values are stored and attended to on one kind of device."""

    name: str
    block_size: int  # tokens a block; the block manager takes it from here

    def plan(self, metadata: AttentionMetadata, device: torch.device) -> Any:
        """Compute what all layers of the step share; opaque to everyone but this backend."""

    def forward(
        self,
        query: torch.Tensor,  # [num_tokens, num_heads, head_dim]
        key: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim]
        value: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim]
        cache: LayerCache,
        plan: Any,
    ) -> torch.Tensor:  # [num_tokens, num_heads, head_dim]
        """Write key and value into the cache, then attend to the cache."""


def select_backend(name: str, device: torch.device) -> AttentionBackend:
    """Choose the backend by name ("auto" chooses for the device) and log the choice and its reason."""
    if name not in ATTENTION_BACKENDS:
        raise ValueError(f"attention backend is {name!r}; known: {', '.join(ATTENTION_BACKENDS)}")
    # Imported here, so that a backend whose kernels this machine lacks is never imported.
    from llm_service.attention.sdpa import SdpaBackend

    reason = "asked for by name" if name == "sdpa" else f"the complete one on {device.type}"
    log.info("attention backend: sdpa (%s)", reason)
    return SdpaBackend(device)
