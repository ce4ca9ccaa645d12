"""The two functions of flash-attn that are used, as its documentation has them, in PyTorch's operators."""

import torch

from llm_service.attention.flash import FlashKernels
from tests.llm_service.attention.steps import naive_attention


def pages_of(cache, table, context_len):
    """[context_len, num_kv_heads, head_dim]; reads no page behind the context."""
    assert cache.is_contiguous() and cache.shape[1] % 256 == 0 and table.dtype == torch.int32
    pages = [cache[block] for block in table[: -(-context_len // cache.shape[1])].tolist()]
    return torch.cat([cache.new_zeros(0, *cache.shape[2:]), *pages])[:context_len]


def varlen_written_out(
    query, keys, values, query_starts, key_starts, max_query, max_key, *, causal, block_table=None
):
    """What flash_attn_varlen_func documents."""
    assert causal and query_starts.dtype == key_starts.dtype == torch.int32
    output = torch.full_like(query, float("nan"))
    for i in range(len(query_starts) - 1):
        rows = slice(query_starts[i], query_starts[i + 1])
        start, end = key_starts[i].item(), key_starts[i + 1].item()
        assert rows.stop - rows.start <= max_query and end - start <= max_key
        if block_table is None:
            context = keys[start:end], values[start:end]
        else:
            context = tuple(pages_of(cache, block_table[i], end - start) for cache in (keys, values))
        output[rows] = naive_attention(query[rows], *context)
    return output


def with_kvcache_written_out(query, keys, values, *, cache_seqlens, block_table, causal):
    """What flash_attn_with_kvcache documents."""
    assert causal and cache_seqlens.dtype == torch.int32
    output = torch.zeros_like(query)
    for i, context_len in enumerate(cache_seqlens.tolist()):
        if context_len:
            context = (pages_of(cache, block_table[i], context_len) for cache in (keys, values))
            output[i] = naive_attention(query[i], *context)
    return output


WRITTEN_OUT = FlashKernels(varlen_written_out, with_kvcache_written_out)
