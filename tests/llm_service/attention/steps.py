"""Random steps for the tests of attention backends, and attention written out to compare them with."""

import random

import torch

from llm_service.attention.base import AttentionMetadata
from llm_service.attention.sdpa import BLOCK_SIZE
from llm_service.kv_cache import LayerCache

HEAD_DIM = 8
NUM_BLOCKS = 400
CPU = torch.device("cpu")


def random_lengths(seed, histories):
    """(query_len, context_len) of a few sequences."""
    chooser = random.Random(seed)
    queries = chooser.choices([1, 1, 2, 16, 19], k=chooser.randint(1, 6))
    return [(query, query + chooser.choice(histories)) for query in queries]


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
        block_size=BLOCK_SIZE,
    ):
        generator = torch.Generator().manual_seed(seed)
        self.lengths = lengths
        self.block_size = block_size

        def random_tensor(tokens, heads):
            return torch.randn(tokens, heads, head_dim, generator=generator)

        shape = (num_blocks, block_size, num_kv_heads, head_dim)
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
            count = -(-context // self.block_size)
            tables.append(free[:count])
            free = free[count:]
        return tables

    def slots(self, i, start, end):
        table, size = self.tables[i], self.block_size
        return [table[p // size] * size + p % size for p in range(start, end)]

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
            stale = self.slots(i, context, len(self.tables[i]) * self.block_size)
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


class Decodes:
    """Device tensors of a batch of decodes as a CUDA graph holds them, to be filled step by step."""

    def __init__(self, batch, max_blocks, step, dtype, device):
        self.step, self.device = step, device
        self.cache = step.cache_on(device)
        self.slots = torch.zeros(batch, dtype=torch.int64, device=device)
        self.tables = torch.zeros(batch, max_blocks, dtype=torch.int32, device=device)
        self.lens = torch.zeros(batch, dtype=torch.int32, device=device)
        shape = (batch, *step.queries[0].shape[1:])
        self.query = torch.zeros(shape, dtype=dtype, device=device)

    def fill(self, members):
        """Members of `step` whose whole contexts are cached, at random rows; returns what to expect."""
        rows = random.Random(0).sample(range(len(self.lens)), len(members))
        expected = torch.zeros(self.query.shape)
        self.lens.zero_()
        self.tables.fill_(1 << 30)  # a padding row's blocks may be anything
        self.query.normal_()
        everything = self.step.expected()
        for row, i in zip(rows, members, strict=True):
            table = torch.tensor(self.step.tables[i], dtype=torch.int32)
            self.tables[row, : len(table)] = table.to(self.device)
            self.lens[row] = self.step.lengths[i][1]
            self.query[row] = self.step.queries[i][0].to(self.device)
            expected[row] = everything[i]
        return expected


def cached_decodes(context_lens, dtype, **shape):
    """A step of decodes whose own keys and values lie in the cache already."""
    step = Step([(1, context) for context in context_lens], **shape)
    for i, context in enumerate(context_lens):
        slots = torch.tensor(step.slots(i, context - 1, context))
        step.cache.write(step.keys[i][-1:], step.values[i][-1:], slots)
    step.spoil_behind_contexts(float("nan"))
    return step.convert(dtype)


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
