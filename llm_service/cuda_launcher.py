"""Steps queued on a CUDA stream: sampled ids stay on the device, and a copy to the host follows each step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llm_service.attention.base import AttentionBackend
from llm_service.capacity import Capacity
from llm_service.config import EngineConfig
from llm_service.decode_graphs import DecodeGraphs
from llm_service.kv_cache import KVCache
from llm_service.messages import StepInput
from llm_service.model.decoder import Decoder
from llm_service.model_runner import ModelRunner
from llm_service.parallel import TensorParallel
from llm_service.sampled_tokens import ChosenTokens, SampledToken
from llm_service.sampler import Sampler
from llm_service.sampler_row import SamplerRow
from llm_service.step_inputs import DecodeInputs, TokenTable
from llm_service.visual_memory import VisualMemory


class CudaPendingStep:
    """A step whose last operation is the copy of its tokens to pinned memory."""

    def __init__(self, choice: ChosenTokens | None) -> None:
        self._choice = None if choice is None else choice.to_host()
        self._end = torch.cuda.Event()
        self._end.record()

    def is_ready(self) -> bool:
        """See PendingStep.is_ready."""
        ended: bool = self._end.query()
        return ended

    def collect(self) -> list[SampledToken]:
        """See PendingStep.collect."""
        self._end.synchronize()
        return [] if self._choice is None else self._choice.tokens()


class CudaLauncher:
    """`graphs` run the steps that they cover; all others run operation by operation."""

    def __init__(
        self,
        runner: ModelRunner,
        decoder: Decoder,
        sampler: Sampler,
        tokens: TokenTable,
        graphs: DecodeGraphs | None,
    ) -> None:
        """`runner` and `graphs` look their token ids up in `tokens`."""
        self.device = tokens.sampled.device
        self._runner = runner
        self._decoder = decoder
        self._sampler = sampler
        self._tokens = tokens
        self._graphs = graphs

    @torch.inference_mode()
    def launch(self, step: StepInput, rows: Sequence[SamplerRow]) -> CudaPendingStep:
        """See StepLauncher.launch."""
        if self._graphs is not None and self._graphs.covers(step):
            hidden = self._graphs.replay(step)
        else:
            hidden = self._runner.hidden(step)
        if not rows:
            return CudaPendingStep(None)
        choice = self._choose(hidden, rows)
        self._tokens.sampled[: len(rows)].copy_(choice.token_ids)
        return CudaPendingStep(choice)

    def _choose(self, hidden: torch.Tensor, rows: Sequence[SamplerRow]) -> ChosenTokens:
        """`hidden` may have rows of padding behind those of `rows`."""
        if all(row.is_plain for row in rows):
            return ChosenTokens(self._decoder.greedy(hidden)[: len(rows)], None)
        return self._sampler.choose(self._decoder.logits(hidden)[: len(rows)], rows)


def build_cuda_launcher(
    decoder: Decoder,
    backend: AttentionBackend,
    memory: VisualMemory,
    config: EngineConfig,
    capacity: Capacity,
    dtype: torch.dtype,
    device: torch.device,
) -> CudaLauncher:
    """For a GPU that holds the whole model: allocates the KV cache and captures the graphs.

    `config` has been through resolve_limits.
    """
    max_batch, block_size = config.max_num_seqs, backend.block_size
    tokens = TokenTable(decoder.config.vocab_size, max_batch, device)
    # The last block belongs to no sequence: what decodes nothing writes there.
    num_blocks = capacity.num_blocks + 1
    kv_cache = KVCache.allocate(decoder.config, num_blocks, block_size, TensorParallel(), dtype, device)
    runner = ModelRunner(decoder, kv_cache, backend, memory, device, tokens)
    graphs = None
    if config.cuda_graphs != "off" and backend.supports_graphs:
        max_blocks = -(-capacity.max_model_len // block_size)
        inputs = DecodeInputs(max_batch, max_blocks, capacity.num_blocks, block_size, tokens)
        graphs = DecodeGraphs(decoder, kv_cache, backend, inputs, max_batch, dtype)
    return CudaLauncher(runner, decoder, Sampler(device), tokens, graphs)
