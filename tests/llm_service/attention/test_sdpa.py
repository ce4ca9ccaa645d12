"""The SDPA backend against attention written out, on random block tables and mixed lengths."""

import random

import pytest
import torch

from llm_service.attention.sdpa import SdpaBackend
from tests.llm_service.attention.steps import BLOCK_SIZE, CPU, MIXES, Step


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
        step.spoil_behind_contexts(1e30)
        torch.testing.assert_close(step.run(SdpaBackend(CPU)), expected)

    def test_attend_reads_what_was_written_and_writes_nothing(self):
        step = Step(MIXES["decodes then chunks"])
        backend = SdpaBackend(CPU)
        plan = backend.plan(step.metadata(), CPU)
        query, key, value = torch.cat(step.queries), step.new(step.keys), step.new(step.values)
        step.cache.write(key, value, plan.slot_mapping)
        written = step.cache.key.clone()
        output = backend.attend(query, key.fill_(0.0), value.fill_(0.0), step.cache, plan)
        torch.testing.assert_close(output, step.expected())
        assert torch.equal(step.cache.key, written)

    def test_cannot_plan_from_lengths_on_the_device(self):
        backend = SdpaBackend(CPU)
        assert not backend.supports_graphs
        numbers = torch.ones(1, 1, dtype=torch.int32)
        with pytest.raises(RuntimeError, match="sdpa"):
            backend.plan_decode(torch.zeros(1, dtype=torch.int64), numbers, numbers[0])

    def test_bf16_stays_close(self):
        step = Step(MIXES["decodes then chunks"])
        exact = step.expected()
        torch.testing.assert_close(
            step.convert(torch.bfloat16).run(SdpaBackend(CPU)).float(), exact, atol=0.03, rtol=0.03
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestSdpaOnCuda:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("mix", MIXES)
    def test_equals_attention_written_out(self, mix, dtype):
        device = torch.device("cuda")
        step = Step(MIXES[mix])
        exact = step.expected()
        tolerance = 1e-5 if dtype is torch.float32 else 0.03
        output = step.convert(dtype).run(SdpaBackend(device), device).float()
        torch.testing.assert_close(output, exact, atol=tolerance, rtol=tolerance)
