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
    supports_graphs: bool  # plan_decode works, and a CUDA graph may hold attend

    def warm_up(self, num_heads: int, cache: LayerCache, max_query_len: int) -> None:
        """Compile now what serving would compile in a step; on the thread that serves, writing no cache.

        `num_heads` are this rank's query heads, `max_query_len` the most tokens of a sequence in a step.
        """

    def plan(self, metadata: AttentionMetadata, device: torch.device) -> Any:
        """Compute what all layers of the step share; opaque but for its `slot_mapping`."""

    def plan_decode(
        self,
        slot_mapping: torch.Tensor,  # [batch] int64
        block_tables: torch.Tensor,  # [batch, max_blocks] int32
        context_lens: torch.Tensor,  # [batch] int32, the new token included; 0 for a row that is padding
    ) -> Any:
        """A plan for one token of each of `batch` sequences, read from these tensors on the device.

        Their contents may change between replays of a graph that was captured with the plan; the tensors may
        not.  A padding row gets zeros and reads nothing: its blocks may be anything.  Only where
        `supports_graphs`.
        """

    def attend(
        self,
        query: torch.Tensor,  # [num_tokens, num_heads, head_dim]
        key: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim], as it was written into the cache
        value: torch.Tensor,  # [num_tokens, num_kv_heads, head_dim], as it was written into the cache
        cache: LayerCache,
        plan: Any,
    ) -> torch.Tensor:  # [num_tokens, num_heads, head_dim]
        """Attend to the cache, which holds this step's keys and values already."""

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
    if name == "cuda" and device.type != "cuda":
        raise ValueError(f"attention backend 'cuda' needs a CUDA device, not {device.type}")
    reason = "asked for by name" if name != "auto" else f"the fastest on {device.type}"
    chosen = name if name != "auto" else ("cuda" if device.type == "cuda" else "sdpa")
    log.info("attention backend: %s (%s)", chosen, reason)
    # Imported here, so that a backend whose kernels this machine lacks is never imported.
    if chosen == "cuda":
        from llm_service.attention.cuda import CudaBackend

        return CudaBackend(device)
    from llm_service.attention.sdpa import SdpaBackend

    return SdpaBackend(device)
