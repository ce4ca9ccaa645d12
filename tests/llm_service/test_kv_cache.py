"""Sizes of the KV cache, whole and shared among ranks."""

import dataclasses

import pytest
import torch

from llm_service.kv_cache import KVCache, LayerCache, bytes_per_block
from llm_service.parallel import TensorParallel
from tests.llm_service.model.steps import QWEN3_8B

CPU = torch.device("cpu")


def test_a_qwen3_8b_token_takes_the_known_bytes():
    # reference: 147,456 bytes a token in bf16
    assert bytes_per_block(QWEN3_8B, 16, torch.bfloat16, TensorParallel()) == 16 * 147456


@pytest.mark.parametrize(("size", "share"), [(2, 2), (8, 8), (16, 8)])
def test_ranks_share_kv_heads_until_each_has_one(size, share):
    whole = bytes_per_block(QWEN3_8B, 16, torch.bfloat16, TensorParallel())
    assert bytes_per_block(QWEN3_8B, 16, torch.bfloat16, TensorParallel(1, size)) == whole // share


def test_allocated_bytes_are_the_promised_ones():
    config = dataclasses.replace(QWEN3_8B, num_layers=2)
    parallel = TensorParallel(0, 4)
    cache = KVCache.allocate(config, 3, 16, parallel, torch.float32, CPU)
    tensors = [t for layer in cache.layers for t in (layer.key, layer.value)]
    assert tensors[0].shape == (3, 16, 2, 128)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert total == 3 * bytes_per_block(config, 16, torch.float32, parallel)


def test_write_puts_tokens_into_their_slots():
    cache = LayerCache(torch.zeros(4, 2, 1, 3), torch.zeros(4, 2, 1, 3))
    key, value = torch.ones(2, 1, 3), torch.full((2, 1, 3), 2.0)
    cache.write(key, value, torch.tensor([5, 0]))
    assert cache.key[2, 1].eq(1).all() and cache.key[0, 0].eq(1).all()
    assert cache.key.sum() == 6 and cache.value.sum() == 12
