"""What the decoder asks of attention: write this step's keys and values, attend causally to the cache.

One file a backend; the choice is made once, at start.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

import torch

from llm_service.config import ATTENTION_BACKENDS
from llm_service.kv_cache import LayerCache

FLASH_ATTN_MIN_CAPABILITY = (8, 0)
# Where "auto" takes flash-attn: Ampere and Ada, for which it is written.  On Hopper cuDNN is faster.
FLASH_ATTN_AUTO_MAJOR = 8
FLASH_ATTN_DTYPES = (torch.bfloat16, torch.float16)

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


@dataclass(frozen=True)
class Machine:
    """What the choice of a backend depends on, beside its name."""

    device: torch.device
    capability: tuple[int, int] | None  # compute capability; None without CUDA
    has_flash_attn: bool  # the package is installed; it may still fail to load

    @classmethod
    def of(cls, device: torch.device) -> Machine:
        """Looks for packages without importing them."""
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
        return cls(device, capability, find_spec("flash_attn") is not None)


def choose_backend(name: str, machine: Machine, dtype: torch.dtype) -> tuple[str, str]:
    """The backend's name and why it was chosen; `dtype` is that of the KV cache.

    Raises:
        ValueError: there is no such backend, or it cannot run here.
    """
    if name not in ATTENTION_BACKENDS:
        raise ValueError(f"attention backend is {name!r}; known: {', '.join(ATTENTION_BACKENDS)}")
    if name != "auto":
        _require_runnable(name, machine, dtype)
        return name, "asked for by name"
    if machine.capability is None:
        return "sdpa", f"the fastest on {machine.device.type}"
    if machine.capability[0] == FLASH_ATTN_AUTO_MAJOR and dtype in FLASH_ATTN_DTYPES:
        if machine.has_flash_attn:
            return "flash-attn", "installed, and written for Ampere and Ada"
        return "cuda", "flash-attn is not installed"
    return "cuda", f"the fastest on {machine.device.type}"


def _require_runnable(name: str, machine: Machine, dtype: torch.dtype) -> None:
    if name == "sdpa":
        return
    if machine.capability is None:
        raise ValueError(f"attention backend {name!r} needs a CUDA device, not {machine.device.type}")
    if name != "flash-attn":
        return
    if machine.capability < FLASH_ATTN_MIN_CAPABILITY:
        major, minor = machine.capability
        raise ValueError(
            f"attention backend 'flash-attn' needs compute capability 8.0 or newer, not {major}.{minor}"
        )
    if not machine.has_flash_attn:
        raise ValueError("attention backend 'flash-attn' needs the package flash-attn (extra: gpu)")
    if dtype not in FLASH_ATTN_DTYPES:
        used = str(dtype).removeprefix("torch.")
        raise ValueError(f"attention backend 'flash-attn' needs dtype bfloat16 or float16, not {used}")


def select_backend(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> AttentionBackend:
    """Choose the backend by name ("auto" chooses for the device) and log the choice and its reason."""
    chosen, reason = choose_backend(name, Machine.of(device), dtype)
    log.info("attention backend: %s (%s)", chosen, reason)
    # Imported here, so that a backend whose kernels this machine lacks is never imported.
    if chosen == "cuda":
        from llm_service.attention.cuda import CudaBackend

        return CudaBackend(device)
    if chosen == "flash-attn":
        from llm_service.attention.flash import FlashBackend, FlashKernels

        return FlashBackend(FlashKernels.installed())
    from llm_service.attention.sdpa import SdpaBackend

    return SdpaBackend(device)
