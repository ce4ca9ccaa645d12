"""Steps that only decode, as CUDA graphs over a ladder of batch sizes: one launch instead of hundreds."""

from __future__ import annotations

import logging
import time
from bisect import bisect_left

import torch

from llm_service.attention.base import AttentionBackend
from llm_service.kv_cache import KVCache
from llm_service.messages import StepInput
from llm_service.model.decoder import Decoder
from llm_service.step_inputs import DecodeInputs

log = logging.getLogger(__name__)


def graph_sizes(max_batch: int) -> list[int]:
    """Batch sizes to capture: a step is padded to the next one, which costs less the larger it is."""
    ladder = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, max_batch, 64)]
    return [size for size in ladder if size < max_batch] + [max_batch]


class DecodeGraphs:
    """From the ids in `inputs` to the final hidden states; the head runs outside, as each step needs it."""

    def __init__(
        self,
        decoder: Decoder,
        kv_cache: KVCache,
        backend: AttentionBackend,
        inputs: DecodeInputs,
        max_batch: int,
        dtype: torch.dtype,
    ) -> None:
        """Captures all sizes, the largest first: the others then find room in its memory."""
        self._decoder = decoder
        self._kv_cache = kv_cache
        self._backend = backend
        self._inputs = inputs
        self._sizes = graph_sizes(max_batch)
        device = inputs.block_tables.device
        self._hidden = torch.zeros(max_batch, decoder.config.hidden_size, dtype=dtype, device=device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._capture_all(device)

    def covers(self, step: StepInput) -> bool:
        """Whether every sequence decodes one token, and there are not too many."""
        batch = len(step.query_lens)
        return (
            len(step.token_ids) == len(step.logits_positions) == batch <= self._sizes[-1]
            and not step.visual_rows
        )

    def replay(self, step: StepInput) -> torch.Tensor:
        """Hidden states [size, hidden_size] of a step that is covered; rows behind its own are padding.

        They are valid until the next replay.
        """
        size = self._sizes[bisect_left(self._sizes, len(step.query_lens))]
        self._inputs.fill(step, size)
        self._graphs[size].replay()
        return self._hidden[:size]

    @torch.inference_mode()
    def _capture_all(self, device: torch.device) -> None:
        start = time.monotonic()
        free_before, _ = torch.cuda.mem_get_info(device)
        self._inputs.fill_with_padding()
        stream = torch.cuda.Stream(device)
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(self._sizes):
            self._warm_up(size, stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                self._compute(size)
            self._graphs[size] = graph
        torch.cuda.synchronize(device)
        free, _ = torch.cuda.mem_get_info(device)
        log.info(
            "captured CUDA graphs for %d batch sizes up to %d in %.1f s, %.2f GiB",
            len(self._sizes),
            self._sizes[-1],
            time.monotonic() - start,
            (free_before - free) / 2**30,
        )

    def _warm_up(self, size: int, stream: torch.cuda.Stream) -> None:
        """Compile and tune what this size runs, which a capture must not do."""
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._compute(size)
            self._decoder.greedy(self._hidden[:size])
        torch.cuda.current_stream().wait_stream(stream)

    def _compute(self, size: int) -> None:
        inputs = self._inputs
        plan = self._backend.plan_decode(
            inputs.slot_mapping[:size], inputs.block_tables[:size], inputs.context_lens[:size]
        )
        hidden = self._decoder.embed(inputs.token_ids(size))  # [size, hidden_size]
        hidden = self._decoder(hidden, inputs.positions[:size], self._kv_cache, plan)
        self._hidden[:size].copy_(hidden)
