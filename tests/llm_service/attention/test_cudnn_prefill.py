"""What goes into cuDNN's padded buffers, with PyTorch's attention in its place; test_cuda.py has its own."""

import pytest
import torch
import torch.nn.functional as F

from llm_service.attention.cudnn_prefill import MAX_HISTORY, MIN_TOKENS, CudnnPrefill
from tests.llm_service.attention.steps import Step, naive_attention

LENGTHS = (32, 48)


class OnCpu(CudnnPrefill):
    def __init__(self, step):
        super().__init__()
        self._lengths = list(LENGTHS)
        shapes = (step.queries[0].shape[1:], step.cache.key.shape[2:], step.cache.key.shape[2:])
        # What other prompts left there must not matter.
        self._buffers = [torch.randn(LENGTHS[-1], *shape) for shape in shapes]

    def _attend_padded(self, length):
        query, key, value = (buffer[:length].transpose(0, 1) for buffer in self._buffers)
        repeats = len(query) // len(key)
        key, value = key.repeat_interleave(repeats, 0), value.repeat_interleave(repeats, 0)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(0, 1)


@pytest.mark.parametrize(
    ("query_len", "context_len", "padded"),
    [(32, 32, 32), (20, 20, 32), (17, 30, 32), (40, 41, 48), (1, 3, 32)],
)
def test_a_prompts_last_tokens_see_all_before_them(query_len, context_len, padded):
    step = Step([(query_len, context_len)])
    prefill = OnCpu(step)
    start = context_len - query_len
    history = torch.tensor(step.slots(0, 0, start), dtype=torch.int32)
    fresh = (step.keys[0][start:], step.values[0][start:])
    for _ in range(2):  # the second on what the first has left
        output = prefill.attend(step.queries[0], *fresh, padded, step.cache, history)
        expected = naive_attention(step.queries[0], step.keys[0], step.values[0])
        torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)


def test_short_contexts_and_long_histories_are_left_to_others():
    prefill = OnCpu(Step([(4, 4)]))
    prefill._lengths = [MIN_TOKENS, 2 * MIN_TOKENS]
    assert prefill.padded_len(MIN_TOKENS - 1, MIN_TOKENS - 1) is None
    assert prefill.padded_len(MIN_TOKENS, MIN_TOKENS) == MIN_TOKENS
    assert prefill.padded_len(MIN_TOKENS, MIN_TOKENS + 1) == 2 * MIN_TOKENS
    assert prefill.padded_len(MIN_TOKENS, 2 * MIN_TOKENS + 1) is None
    chunk = 2000
    history = int(MAX_HISTORY * chunk)
    assert prefill.padded_len(chunk, chunk + history) == 2 * MIN_TOKENS
    assert prefill.padded_len(chunk, chunk + history + 1) is None
