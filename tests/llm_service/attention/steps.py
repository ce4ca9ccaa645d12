"""Random steps for the tests of attention backends, and attention written out to compare them with."""

import random

import torch

from llm_service.attention.base import AttentionMetadata
from llm_service.attention.sdpa import SdpaBackend
from llm_service.kv_cache import LayerCache

HEAD_DIM = 8
NUM_BLOCKS = 400
BLOCK_SIZE = SdpaBackend.block_size
CPU = torch.device("cpu")


def naive_attention(query, keys, values):
    """[query_len, heads, dim] on [context_len, kv_heads, dim]: the last query sees everything."""
    repeats = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(repeats, 1), values.repeat_interleave(repeats, 1)
    scores = torch.einsum("qhd,khd->hqk", query.double(), keys.double()) * query.shape[2] ** -0.5
    query_len, context_len = scores.shape[1:]
    visible = torch.ones(query_len, context_len).tril(context_len - query_len).bool()
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values.double()).float()


class Step:
    """Random sequences of (query_len, context_len), whose history already lies in the cache."""

    def __init__(
        self,
        lengths,
        num_heads=4,
        num_kv_heads=2,
        consecutive=False,
        seed=0,
        head_dim=HEAD_DIM,
        num_blocks=NUM_BLOCKS,
    ):
        generator = torch.Generator().manual_seed(seed)
        self.lengths = lengths

        def random_tensor(tokens, heads):
            return torch.randn(tokens, heads, head_dim, generator=generator)

        shape = (num_blocks, BLOCK_SIZE, num_kv_heads, head_dim)
        self.cache = LayerCache(
            torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
        )
        self.keys = [random_tensor(context, num_kv_heads) for _, context in lengths]
        self.values = [random_tensor(context, num_kv_heads) for _, context in lengths]
        self.queries = [random_tensor(query, num_heads) for query, _ in lengths]
        self.tables = self.block_tables(consecutive, seed)
        self.fill_history()

    def block_tables(self, consecutive, seed):
        free = list(range(len(self.cache.key)))
        if not consecutive:
            random.Random(seed).shuffle(free)
        tables = []
        for _, context in self.lengths:
            count = -(-context // BLOCK_SIZE)
            tables.append(free[:count])
            free = free[count:]
        return tables

    def slots(self, i, start, end):
        table = self.tables[i]
        positions = range(start, end)
        return [table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in positions]

    def fill_history(self):
        for i, (query, context) in enumerate(self.lengths):
            slots = torch.tensor(self.slots(i, 0, context - query), dtype=torch.int64)
            history = context - query
            self.cache.write(self.keys[i][:history], self.values[i][:history], slots)

    def metadata(self):
        slots = [
            slot
            for i, (query, context) in enumerate(self.lengths)
            for slot in self.slots(i, context - query, context)
        ]
        return AttentionMetadata(
            query_lens=[query for query, _ in self.lengths],
            context_lens=[context for _, context in self.lengths],
            block_tables=self.tables,
            slot_mapping=torch.tensor(slots),
        )

    def new(self, tensors):
        pairs = zip(tensors, self.lengths, strict=True)
        return torch.cat([tensor[context - query :] for tensor, (query, context) in pairs])

    def convert(self, dtype):
        """Round all numbers to `dtype`; returns itself."""
        for name in ("keys", "values", "queries"):
            setattr(self, name, [tensor.to(dtype) for tensor in getattr(self, name)])
        self.cache = LayerCache(self.cache.key.to(dtype), self.cache.value.to(dtype))
        return self

    def spoil_behind_contexts(self, number):
        """Fill the slots of the sequences' blocks that lie behind their contexts."""
        for i, (_, context) in enumerate(self.lengths):
            stale = self.slots(i, context, len(self.tables[i]) * BLOCK_SIZE)
            self.cache.key.flatten(0, 1)[stale] = number
            self.cache.value.flatten(0, 1)[stale] = number

    def run(self, backend, device=CPU):
        plan = backend.plan(self.metadata(), device)
        query, key, value = torch.cat(self.queries), self.new(self.keys), self.new(self.values)
        cache = self.cache_on(device)
        moved = [tensor.to(device) for tensor in (query, key, value)]
        return backend.forward(*moved, cache, plan).cpu()

    def cache_on(self, device):
        return LayerCache(self.cache.key.to(device), self.cache.value.to(device))

    def expected(self):
        triples = zip(self.queries, self.keys, self.values, strict=True)
        return torch.cat([naive_attention(*triple) for triple in triples])


MIXES = {
    "one decode": [(1, 37)],
    "one whole prompt": [(50, 50)],
    "first token of all": [(1, 1)],
    "a later chunk": [(16, 70)],
    "decodes of one length": [(1, 33), (1, 33), (1, 33)],
    "decodes of mixed lengths": [(1, 5), (1, 160), (1, 16), (1, 17), (1, 1)],
    "decodes then chunks": [(1, 20), (1, 90), (7, 7), (16, 48), (3, 100)],
    "chunks between decodes": [(9, 30), (1, 12), (31, 31), (1, 64), (2, 2)],
    "decodes beyond one gather": [(1, 600), (1, 1500), (1, 40), (1, 2100), (1, 700)],
}
