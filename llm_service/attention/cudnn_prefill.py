"""Long prompts and their last chunks by cuDNN's attention, fastest on Hopper (534 TFLOP/s at 8,192 tokens).

A chunk behind a history that is not much longer runs as the whole prompt, with whatever is in the place of
the queries before it: their rows are computed for nothing. cuDNN builds a plan for every shape (tenths of a
second), so that prompts are padded to a few lengths whose plans are built before serving, on the thread that
serves: PyTorch keeps plans by thread.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch

from llm_service.kv_cache import LayerCache

log = logging.getLogger(__name__)

# Measured on an H200: Triton is faster at 2,048 and 3,400 tokens, cuDNN at 8,192 (534 against 398 TFLOP/s).
MIN_TOKENS = 4096
# Padded lengths are multiples of this: at most 13 % more work from 4096 tokens on, half that on average.
STEP = 256
# By the figures above, (history + chunk)^2 / 2 at 532 TFLOP/s against the chunk's own part at 370.
MAX_HISTORY = 1.2  # in lengths of the chunk
# cuDNN's attention is the faster one on these; elsewhere it is untested here.
MAJOR_CAPABILITIES = (9, 10)


class CudnnPrefill:
    """Knows the lengths it has plans for; holds one padded buffer each for queries, keys and values."""

    def __init__(self) -> None:
        self._lengths: list[int] = []
        self._buffers: list[torch.Tensor] = []

    def warm_up(self, num_heads: int, cached: torch.Tensor, max_tokens: int) -> None:
        """Build plans for prompts of up to `max_tokens` tokens; `cached` has the KV cache's shape and type.

        Where cuDNN refuses, no length is taken and the log says why.
        """
        if cached.device.type != "cuda" or cached.element_size() != 2 or max_tokens < MIN_TOKENS:
            return
        if torch.cuda.get_device_capability(cached.device)[0] not in MAJOR_CAPABILITIES:
            return
        lengths = list(_lengths(max_tokens))
        num_kv_heads, head_dim = cached.shape[2:]
        # Zeros: rows behind a prompt are read, and what they hold must be finite.
        self._buffers = [
            cached.new_zeros((lengths[-1], heads, head_dim))
            for heads in (num_heads, num_kv_heads, num_kv_heads)
        ]
        try:
            for length in lengths:
                self._attend_padded(length)
        except RuntimeError as error:
            log.warning("cuDNN attention is not used for prompts: %s", str(error).partition("\n")[0])
            self._buffers = []
            return
        self._lengths = lengths

    def padded_len(self, query_len: int, context_len: int) -> int | None:
        """What the last `query_len` of `context_len` tokens run as; None if cuDNN should not take them."""
        if context_len < MIN_TOKENS or context_len - query_len > MAX_HISTORY * query_len:
            return None
        return next((length for length in self._lengths if length >= context_len), None)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        padded_len: int,
        cache: LayerCache,
        history: torch.Tensor,
    ) -> torch.Tensor:
        """Causal attention of a prompt's last tokens, [num_tokens, heads, head_dim] -> the query's shape.

        `history` [num_tokens_before] int32: slots of the cache that hold what comes before them.
        """
        start = len(history)
        queries, keys, values = self._buffers
        for buffer, cached, fresh in ((keys, cache.key, key), (values, cache.value, value)):
            if start:
                torch.index_select(cached.flatten(0, 1), 0, history, out=buffer[:start])
            buffer[start : start + len(fresh)].copy_(fresh)
        queries[start : start + len(query)].copy_(query)
        return self._attend_padded(padded_len)[start : start + len(query)]

    def _attend_padded(self, length: int) -> torch.Tensor:
        """Rows behind a prompt's end are seen by no row of it: attention is causal.  Those before a chunk are
        seen as keys and values only."""
        # [1, heads, length, head_dim]; cuDNN reads grouped KV heads as they are.
        query, key, value = (buffer[:length].transpose(0, 1).unsqueeze(0) for buffer in self._buffers)
        attended: torch.Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, False, 0.0, True
        )[0]
        return attended[0].transpose(0, 1)


def _lengths(max_tokens: int) -> Iterator[int]:
    """Multiples of STEP that cover MIN_TOKENS .. max_tokens."""
    longest = -(-max_tokens // STEP) * STEP
    return iter(range(MIN_TOKENS, longest + 1, STEP))
