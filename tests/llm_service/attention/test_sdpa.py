"""The SDPA backend against attention written out, on random block tables and mixed lengths."""

import random

import pytest
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
    scores = torch.einsum("qhd,khd->hqk", query.double(), keys.double()) * HEAD_DIM**-0.5
    query_len, context_len = scores.shape[1:]
    visible = torch.ones(query_len, context_len).tril(context_len - query_len).bool()
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values.double()).float()


class Step:
    """Random sequences of (query_len, context_len), whose history already lies in the cache."""

    def __init__(self, lengths, num_heads=4, num_kv_heads=2, consecutive=False, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.lengths = lengths

        def random_tensor(tokens, heads):
            return torch.randn(tokens, heads, HEAD_DIM, generator=generator)

        shape = (NUM_BLOCKS, BLOCK_SIZE, num_kv_heads, HEAD_DIM)
        self.cache = LayerCache(
            torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
        )
        self.keys = [random_tensor(context, num_kv_heads) for _, context in lengths]
        self.values = [random_tensor(context, num_kv_heads) for _, context in lengths]
        self.queries = [random_tensor(query, num_heads) for query, _ in lengths]
        self.tables = self.block_tables(consecutive, seed)
        self.fill_history()

    def block_tables(self, consecutive, seed):
        free = list(range(NUM_BLOCKS))
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

    def run(self, backend, device=CPU):
        plan = backend.plan(self.metadata(), device)
        query, key, value = torch.cat(self.queries), self.new(self.keys), self.new(self.values)
        cache = LayerCache(self.cache.key.to(device), self.cache.value.to(device))
        moved = [tensor.to(device) for tensor in (query, key, value)]
        return backend.forward(*moved, cache, plan).cpu()

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


class TestSdpa:
    @pytest.mark.parametrize("consecutive", [False, True], ids=["scattered", "consecutive"])
    @pytest.mark.parametrize("mix", MIXES)
    def test_equals_attention_written_out(self, mix, consecutive):
        step = Step(MIXES[mix], consecutive=consecutive)
        torch.testing.assert_close(step.run(SdpaBackend(CPU)), step.expected())

    @pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2), (7, 1)])
    def test_any_grouping_of_heads(self, num_heads, num_kv_heads):
        lengths = [(1, 20), (5, 40), (8, 8), (1, 33)]
        step = Step(lengths, num_heads, num_kv_heads)
        torch.testing.assert_close(step.run(SdpaBackend(CPU)), step.expected())

    def test_random_batches_share_one_backend(self):
        backend = SdpaBackend(CPU)
        chooser = random.Random(7)
        for seed in range(20):
            lengths = []
            for _ in range(chooser.randint(1, 6)):
                query = chooser.choice([1, 1, 2, 16, 19])
                lengths.append((query, query + chooser.choice([0, 1, 15, 16, 90])))
            step = Step(lengths, seed=seed)
            torch.testing.assert_close(step.run(backend), step.expected())

    def test_writes_only_the_slots_of_the_step(self):
        step = Step([(1, 20), (4, 30)])
        before = step.cache.key.clone()
        step.run(SdpaBackend(CPU))
        changed = (step.cache.key != before).flatten(1).any(1).view(-1)
        slots = step.metadata().slot_mapping
        assert set(changed.nonzero().flatten().tolist()) <= {s // BLOCK_SIZE for s in slots.tolist()}
        after = step.cache.key.flatten(0, 1)
        torch.testing.assert_close(after[slots], step.new(step.keys))
        untouched = torch.ones(len(after), dtype=torch.bool).index_fill_(0, slots, False)
        assert torch.equal(after[untouched], before.flatten(0, 1)[untouched])

    def test_a_reused_block_keeps_no_trace_of_stale_slots(self):
        step = Step([(1, 5), (1, 40)])
        expected = step.expected()
        for i, (_, context) in enumerate(step.lengths):
            stale = self.slots_after(step, i, context)
            step.cache.key.flatten(0, 1)[stale] = 1e30
            step.cache.value.flatten(0, 1)[stale] = 1e30
        torch.testing.assert_close(step.run(SdpaBackend(CPU)), expected)

    @staticmethod
    def slots_after(step, i, context):
        return step.slots(i, context, len(step.tables[i]) * BLOCK_SIZE)

    def test_bf16_stays_close(self):
        step = Step(MIXES["decodes then chunks"])
        exact = step.expected()
        for name in ("keys", "values", "queries"):
            setattr(step, name, [tensor.bfloat16() for tensor in getattr(step, name)])
        step.cache = LayerCache(step.cache.key.bfloat16(), step.cache.value.bfloat16())
        torch.testing.assert_close(step.run(SdpaBackend(CPU)).float(), exact, atol=0.03, rtol=0.03)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestSdpaOnCuda:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("mix", MIXES)
    def test_equals_attention_written_out(self, mix, dtype):
        device = torch.device("cuda")
        step = Step(MIXES[mix])
        exact = step.expected()
        for name in ("keys", "values", "queries"):
            setattr(step, name, [tensor.to(dtype) for tensor in getattr(step, name)])
        step.cache = LayerCache(step.cache.key.to(dtype), step.cache.value.to(dtype))
        tolerance = 1e-5 if dtype is torch.float32 else 0.03
        output = step.run(SdpaBackend(device), device).float()
        torch.testing.assert_close(output, exact, atol=tolerance, rtol=tolerance)
