"""The flash-attn backend against attention written out: with stand-ins for the kernels, and with the package.

The first run anywhere and check what is asked of the kernels; the second need the package and a GPU.
"""

from importlib.util import find_spec

import pytest
import torch

from llm_service.attention.flash import PAGE_SIZE, FlashBackend, FlashKernels
from llm_service.attention.sdpa import SdpaBackend
from tests.llm_service.attention.flash_written_out import WRITTEN_OUT
from tests.llm_service.attention.steps import (
    CPU,
    MIXES,
    Decodes,
    Step,
    cached_decodes,
    random_lengths,
)

CUDA = torch.device("cuda")
NUM_BLOCKS = 48
TOLERANCE = {"atol": 3e-2, "rtol": 3e-2}  # of bfloat16


def paged_step(lengths, num_heads=4, num_kv_heads=2, **options):
    options = {"num_blocks": NUM_BLOCKS, "block_size": PAGE_SIZE, **options}
    return Step(lengths, num_heads, num_kv_heads, **options)


@pytest.fixture
def backend():
    return FlashBackend(WRITTEN_OUT)


class TestWithKernelsWrittenOut:
    @pytest.mark.parametrize("mix", MIXES)
    def test_equals_attention_written_out(self, backend, mix):
        step = paged_step(MIXES[mix])
        step.spoil_behind_contexts(float("nan"))
        torch.testing.assert_close(step.run(backend), step.expected())

    @pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2), (7, 1)])
    def test_any_grouping_of_heads(self, backend, num_heads, num_kv_heads):
        step = paged_step([(1, 20), (5, 400), (8, 8), (1, 333)], num_heads, num_kv_heads)
        torch.testing.assert_close(step.run(backend), step.expected())

    @pytest.mark.parametrize("context_len", [255, 256, 257, 511, 512, 513])
    def test_contexts_around_the_boundaries_of_pages(self, backend, context_len):
        step = paged_step([(1, context_len), (3, context_len), (context_len, context_len)])
        torch.testing.assert_close(step.run(backend), step.expected())

    def test_equals_the_reference_backend_on_random_batches(self, backend):
        reference = SdpaBackend(CPU, PAGE_SIZE)
        for seed in range(12):
            step = paged_step(random_lengths(seed, [0, 1, 15, 255, 256, 400]), seed=seed)
            torch.testing.assert_close(step.run(backend), step.run(reference))

    def test_a_plan_of_decodes_follows_its_tensors_and_leaves_padding_rows_zero(self, backend):
        step = cached_decodes(
            [3, 900, 256, 530, 17], torch.float32, num_blocks=NUM_BLOCKS, block_size=PAGE_SIZE
        )
        batch = Decodes(4, 6, step, torch.float32, CPU)
        plan = backend.plan_decode(batch.slots, batch.tables, batch.lens)
        for members in ([1, 2, 3], [0, 4], [], [3, 2, 1, 0]):
            expected = batch.fill(members)
            output = backend.attend(batch.query, batch.query, batch.query, batch.cache, plan)
            torch.testing.assert_close(output, expected)

    def test_neighbours_of_one_kind_are_not_gathered(self, backend):
        step = paged_step([(1, 20), (1, 90), (7, 7), (30, 30), (3, 100)])
        plan = backend.plan(step.metadata(), CPU)
        assert (plan.decodes.rows, plan.prompts.rows) == (slice(0, 2), slice(2, 39))
        assert plan.chunks.rows == slice(39, 42)

    def test_warming_up_runs_every_kernel_and_writes_no_cache(self):
        calls = []

        def varlen(*arguments, block_table=None, **options):
            calls.append("prompt" if block_table is None else "chunk")
            return WRITTEN_OUT.varlen(*arguments, block_table=block_table, **options)

        def with_kvcache(*arguments, **options):
            calls.append("decode")
            return WRITTEN_OUT.with_kvcache(*arguments, **options)

        step = paged_step([(1, 1)])
        before = step.cache.key.clone()
        FlashBackend(FlashKernels(varlen, with_kvcache)).warm_up(4, step.cache, 100)
        assert calls == ["decode", "prompt", "chunk"]
        assert torch.equal(step.cache.key, before)

    def test_a_model_that_the_kernels_refuse_is_an_error_that_names_the_backend(self):
        def refuse(*_, **__):
            raise RuntimeError("kernels for head sizes 64 and 128, not 96\nException raised from ...")

        backend = FlashBackend(FlashKernels(refuse, refuse))
        with pytest.raises(ValueError, match="'flash-attn'.*not 96$"):
            backend.warm_up(4, paged_step([(1, 1)]).cache, 100)


def assert_equals_written_out(step):
    exact = step.expected()
    step.convert(torch.bfloat16).spoil_behind_contexts(float("nan"))
    output = step.run(FlashBackend(FlashKernels.installed()), CUDA).float()
    torch.testing.assert_close(output, exact, **TOLERANCE)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec("flash_attn") is None,
    reason="needs a CUDA device and flash-attn",
)
class TestWithThePackage:
    @pytest.mark.parametrize("mix", MIXES)
    @pytest.mark.parametrize("head_dim", [64, 128])
    def test_equals_attention_written_out(self, mix, head_dim):
        assert_equals_written_out(paged_step(MIXES[mix], head_dim=head_dim))

    def test_shapes_of_the_8b_model(self):
        lengths = [(1, 3600), (1, 401), (151, 151), (1, 1), (1000, 1800), (2100, 2100), (1, 2049), (64, 64)]
        assert_equals_written_out(paged_step(lengths, 28, 4, head_dim=128, num_blocks=64))

    @pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2), (7, 1), (17, 1)])
    def test_any_grouping_of_heads(self, num_heads, num_kv_heads):
        lengths = [(1, 20), (5, 400), (8, 8), (1, 333)]
        assert_equals_written_out(paged_step(lengths, num_heads, num_kv_heads, head_dim=64))

    @pytest.mark.parametrize("context_len", [255, 256, 257, 511, 512, 513])
    def test_contexts_around_the_boundaries_of_pages(self, context_len):
        lengths = [(1, context_len), (3, context_len), (context_len, context_len)]
        assert_equals_written_out(paged_step(lengths, head_dim=64))

    def test_close_to_the_reference_backend_in_fp32_on_random_batches(self):
        backend, reference = FlashBackend(FlashKernels.installed()), SdpaBackend(CUDA, PAGE_SIZE)
        for seed in range(6):
            step = paged_step(random_lengths(seed, [0, 1, 255, 256, 700]), head_dim=128, seed=seed)
            exact = step.run(reference, CUDA)
            output = step.convert(torch.bfloat16).run(backend, CUDA).float()
            torch.testing.assert_close(output, exact, **TOLERANCE)

    def test_warming_up_writes_no_cache(self):
        cache = paged_step([(1, 1)], head_dim=128).convert(torch.bfloat16).cache_on(CUDA)
        before = cache.key.clone()
        FlashBackend(FlashKernels.installed()).warm_up(28, cache, 100)
        assert torch.equal(cache.key, before)

    def test_replays_of_a_captured_graph_follow_the_contexts(self):
        contexts = [3, 3600, 64, 1030, 17, 2000, 400, 401]
        step = cached_decodes(
            contexts,
            torch.bfloat16,
            num_heads=28,
            num_kv_heads=4,
            head_dim=128,
            num_blocks=NUM_BLOCKS,
            block_size=PAGE_SIZE,
        )
        batch = Decodes(8, 4096 // PAGE_SIZE, step, torch.bfloat16, CUDA)
        backend = FlashBackend(FlashKernels.installed())
        plan = backend.plan_decode(batch.slots, batch.tables, batch.lens)
        batch.fill([0])
        backend.attend(batch.query, batch.query, batch.query, batch.cache, plan)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = backend.attend(batch.query, batch.query, batch.query, batch.cache, plan)
        for members in ([1, 2, 3], [0, 4], [], [7, 6, 5, 4, 3, 2, 1, 0], [1], [5, 1]):
            expected = batch.fill(members)
            output.fill_(float("nan"))
            graph.replay()
            torch.testing.assert_close(output.float().cpu(), expected, **TOLERANCE)
