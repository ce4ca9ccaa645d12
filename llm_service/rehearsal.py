"""The largest steps that can come, run once before the KV cache exists.

Afterwards the allocator holds the memory that steps need, so that the KV cache may have what is left, and
kernels are compiled.  Knows neither scheduler nor requests.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch

from llm_service.attention.base import AttentionBackend
from llm_service.config import EngineConfig
from llm_service.kv_cache import KVCache
from llm_service.messages import StepInput
from llm_service.model.decoder import Decoder
from llm_service.model_runner import ModelRunner
from llm_service.parallel import TensorParallel
from llm_service.sampler import Sampler
from llm_service.sampler_row import SamplerRow
from llm_service.sampling_params import SamplingParams
from llm_service.visual_memory import VisualMemory

# What takes most memory in the sampler: nuclei of flat logits, and the log-probabilities of every row.
COSTLY_SAMPLING = SamplingParams(temperature=1.0, top_p=0.99, logprobs=20)

log = logging.getLogger(__name__)


def rehearse(
    decoder: Decoder,
    backend: AttentionBackend,
    config: EngineConfig,
    parallel: TensorParallel,
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """Returns the bytes that steps take.  Every rank calls it; `config` has been through resolve_limits.

    Raises:
        ValueError: the steps do not fit into the device's memory.
    """
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)
    try:
        _run(decoder, backend, config, parallel, dtype, device)
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"no memory for steps of {config.max_num_batched_tokens} tokens and {config.max_num_seqs} "
            f"sequences on {device}; lower max_num_batched_tokens or max_num_seqs"
        ) from error
    reserved = torch.cuda.memory_reserved(device) - before
    log.info("the largest steps take %.2f GiB beside weights and KV cache", reserved / 2**30)
    return reserved


def hold(num_bytes: int, device: torch.device) -> None:
    """Let the allocator hold the memory of steps in one piece, from which it serves them.

    A capture of CUDA graphs gives what is cached back to the device; call this behind the last one.
    """
    torch.cuda.empty_cache()
    torch.empty(num_bytes, dtype=torch.uint8, device=device)


def _run(
    decoder: Decoder,
    backend: AttentionBackend,
    config: EngineConfig,
    parallel: TensorParallel,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    model = decoder.config
    longest = min(config.max_model_len or model.max_position_embeddings, model.max_position_embeddings)
    num_blocks = -(-longest // backend.block_size)
    # All layers share the storage of one: what is in it does not matter.
    one = KVCache.allocate(model, num_blocks, backend.block_size, parallel, dtype, device).layers[:1]
    memory = VisualMemory.create(1, 1, model.hidden_size, dtype)
    backend.warm_up(model.num_heads // parallel.size, one[0], config.max_num_batched_tokens)
    runner = ModelRunner(decoder, KVCache(one * model.num_layers), backend, memory, device)
    sampler = Sampler(device)
    for step in largest_steps(
        config.max_num_batched_tokens, config.max_num_seqs, longest, backend.block_size
    ):
        rows = [SamplerRow(COSTLY_SAMPLING, (), ()) for _ in step.logits_positions]
        sampler.sample(runner.forward(step), rows)
    memory.close()


def largest_steps(budget: int, num_seqs: int, longest: int, block_size: int) -> Iterator[StepInput]:
    """Many sequences with a row of logits each; and one long chunk at the end of the longest context."""
    batch = min(num_seqs, budget)
    yield _step(batch, min(budget // batch, longest), min(budget // batch, longest), block_size)
    yield _step(1, min(budget, longest), longest, block_size)


def _step(batch: int, query_len: int, context_len: int, block_size: int) -> StepInput:
    table = list(range(-(-context_len // block_size)))
    return StepInput(
        token_ids=[0] * (batch * query_len),
        query_lens=[query_len] * batch,
        context_lens=[context_len] * batch,
        block_tables=[table] * batch,
        visual_rows=[],
        logits_positions=[(row + 1) * query_len - 1 for row in range(batch)],
    )
