"""How much fits: device, element type, KV blocks, context length and visual slots, decided once at start."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from llm_service.config import EngineConfig
from llm_service.kv_cache import bytes_per_block
from llm_service.model.config import DecoderConfig
from llm_service.parallel import TensorParallel
from protos.checkpoint import Checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FLOAT8_CAPABILITY = (8, 9)
MIN_SLOTS = 2
MAX_SLOTS = 4096
GPU_NUM_SEQS, CPU_NUM_SEQS = 256, 64
CPU_MIN_OVERLAP_TOKENS = 1  # a step of few tokens takes as much less
GPU_NUM_BATCHED_TOKENS, CPU_NUM_BATCHED_TOKENS = 8192, 2048
# Of the GPU, for captured graphs and for what the allocator loses between blocks.
GRAPH_BYTES = 1 << 30
FRAGMENTATION_BYTES = 1 << 29


@dataclass(frozen=True)
class Capacity:
    num_blocks: int
    max_model_len: int
    num_slots: int
    slot_tokens: int


def resolve_device(device: str, rank: int = 0) -> torch.device:
    """ "auto" is the rank's GPU where there is one; raises ValueError for a device that is not there."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if device not in ("auto", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {device!r}")
    if not torch.cuda.is_available():
        raise ValueError("device is cuda, but PyTorch sees no GPU")
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


def resolve_dtype(dtype: str, checkpoint: Checkpoint) -> torch.dtype:
    """ "auto" is what the checkpoint says (torch_dtype or dtype, also of its text part); else bfloat16."""
    if dtype != "auto":
        return DTYPES[dtype]
    config = checkpoint.config
    text = config.get("text_config") or config.get("llm_config") or {}
    for source in (config, text):
        named = source.get("torch_dtype") or source.get("dtype")
        if named in DTYPES:
            return DTYPES[named]
    return torch.bfloat16


def gpu_capability(device: torch.device) -> tuple[int, int] | None:
    """CUDA's compute capability; None where the device is no GPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def check_quantization(quantization: str, capability: tuple[int, int] | None, dtype: torch.dtype) -> None:
    """Raises ValueError where a GPU of this capability cannot compute so with this element type.

    Without one (None) all can: the matrices are widened anew for each product.
    """
    if quantization == "none" or capability is None:
        return
    if capability < FLOAT8_CAPABILITY:
        raise ValueError(
            f"quantization {quantization} needs a GPU of compute capability {_dotted(FLOAT8_CAPABILITY)} or "
            f"newer, this one has {_dotted(capability)}"
        )
    if dtype is not torch.bfloat16:  # torch._scaled_mm with scales of rows gives nothing else
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"quantization {quantization} needs dtype bfloat16, got {name}")


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def resolve_limits(config: EngineConfig, device: torch.device) -> EngineConfig:
    """Make numbers of those that are 0 by default; a default gives way to what was set.

    On a GPU `min_overlap_tokens` may stay 0: each request's encoder decides.
    """
    is_gpu = device.type == "cuda"
    num_seqs = config.max_num_seqs or (GPU_NUM_SEQS if is_gpu else CPU_NUM_SEQS)
    budget = config.max_num_batched_tokens or (GPU_NUM_BATCHED_TOKENS if is_gpu else CPU_NUM_BATCHED_TOKENS)
    if not config.max_num_seqs:
        num_seqs = min(num_seqs, budget)
    budget = max(budget, num_seqs)
    min_overlap = config.min_overlap_tokens or (0 if is_gpu else CPU_MIN_OVERLAP_TOKENS)
    return dataclasses.replace(
        config, max_num_seqs=num_seqs, max_num_batched_tokens=budget, min_overlap_tokens=min_overlap
    )


def plan_capacity(
    config: EngineConfig,
    model: DecoderConfig,
    tokens_per_tile: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    parallel: TensorParallel,
) -> Capacity:
    """Call after the weights are loaded and, on a GPU, the largest steps have been rehearsed.

    `config` has been through resolve_limits.

    Raises:
        ValueError: the settings ask for more than the checkpoint or the memory allows.
    """
    longest = config.max_model_len or model.max_position_embeddings
    if longest > model.max_position_embeddings:
        raise ValueError(
            f"max_model_len {longest} exceeds the checkpoint's {model.max_position_embeddings} positions"
        )
    block_bytes = bytes_per_block(model, block_size, dtype, parallel)
    num_blocks = config.num_kv_blocks or _affordable_blocks(config, block_bytes, device)
    useful = config.max_num_seqs * -(-longest // block_size)
    num_blocks = num_blocks if config.num_kv_blocks else min(num_blocks, useful)
    if config.max_model_len and num_blocks * block_size < config.max_model_len:
        raise ValueError(
            f"max_model_len {config.max_model_len} needs more than the {num_blocks} KV blocks of "
            f"{block_size} tokens that fit; lower it or raise kv_cache_gib, num_kv_blocks "
            "or gpu_memory_utilization"
        )
    return Capacity(
        num_blocks=num_blocks,
        max_model_len=min(longest, num_blocks * block_size),
        num_slots=_num_slots(config, tokens_per_tile * model.hidden_size * dtype.itemsize),
        slot_tokens=tokens_per_tile,
    )


def _affordable_blocks(config: EngineConfig, block_bytes: int, device: torch.device) -> int:
    if device.type == "cpu":
        budget = config.kv_cache_gib * 2**30
    else:
        # Not free any more: weights, what the rehearsed steps took, and what other processes hold.
        free, total = torch.cuda.mem_get_info(device)
        # One block more than sequences get is for the padding of decode steps.
        budget = free - total * (1 - config.gpu_memory_utilization) - FRAGMENTATION_BYTES - block_bytes
        if config.cuda_graphs != "off":
            budget -= GRAPH_BYTES
    num_blocks = int(budget // block_bytes)
    if num_blocks < 1:
        raise ValueError(
            f"no memory for a KV cache on {device}: {budget / 2**30:.2f} GiB are left; "
            "raise kv_cache_gib or gpu_memory_utilization"
        )
    return num_blocks


def _num_slots(config: EngineConfig, slot_bytes: int) -> int:
    return min(max(int(config.visual_store_gib * 2**30 // slot_bytes), MIN_SLOTS), MAX_SLOTS)
