"""The CUDA backend against attention written out: in Triton's interpreter, and for real where there is a GPU.

The interpreter multiplies bf16 numbers' bit patterns, so that it is given fp32 and fp16 only.
"""

import random

import pytest
import torch

from llm_service.attention.base import AttentionMetadata
from llm_service.attention.cuda import CudaBackend
from llm_service.attention.sdpa import SdpaBackend
from llm_service.attention.triton_decode import MAX_SPLITS, split_plan
from llm_service.attention.triton_prefill import TILE_FIELDS, cut_tiles
from tests.interpreter import INTERPRETED
from tests.llm_service.attention.steps import BLOCK_SIZE, CPU, MIXES, Decodes, Step, cached_decodes

# On a GPU fp32 is multiplied as three tf32 products.
FP32_TOLERANCE = 1e-4 if torch.cuda.is_available() else 1e-5
TOLERANCES = {torch.float32: FP32_TOLERANCE, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# In the interpreter a program takes milliseconds a tile.
SMALL_MIXES = [name for name in MIXES if name != "decodes beyond one gather"]

interpreted = pytest.mark.skipif(not INTERPRETED, reason="test_base.py runs it in Triton's interpreter")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def assert_equals_written_out(step, device, dtype=torch.float32):
    exact = step.expected()
    step.convert(dtype).spoil_behind_contexts(float("nan"))
    output = step.run(CudaBackend(device), device).float()
    torch.testing.assert_close(output, exact, atol=TOLERANCES[dtype], rtol=TOLERANCES[dtype])


@interpreted
class TestInterpreted:
    @pytest.mark.parametrize("mix", SMALL_MIXES)
    def test_equals_attention_written_out(self, mix):
        assert_equals_written_out(Step(MIXES[mix]), CPU)

    def test_half_precision_stays_close(self):
        assert_equals_written_out(Step(MIXES["decodes then chunks"]), CPU, torch.float16)

    @pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2), (7, 1), (17, 1)])
    def test_any_grouping_of_heads(self, num_heads, num_kv_heads):
        lengths = [(1, 20), (5, 40), (8, 8), (1, 33)]
        assert_equals_written_out(Step(lengths, num_heads, num_kv_heads), CPU)

    @pytest.mark.parametrize("head_dim", [8, 48, 64, 128])
    def test_any_head_size(self, head_dim):
        lengths = [(1, 129), (5, 70)]
        assert_equals_written_out(Step(lengths, head_dim=head_dim), CPU)

    @pytest.mark.parametrize("context_len", [1, 15, 16, 17, 63, 64, 65, 127, 128, 129])
    def test_contexts_around_the_boundaries_of_tiles_and_pages(self, context_len):
        lengths = [(1, context_len), (min(context_len, 3), context_len)]
        assert_equals_written_out(Step(lengths), CPU)

    def test_a_long_chunk_takes_wide_tiles(self):
        assert_equals_written_out(Step([(300, 330), (2, 9)], num_heads=2, num_kv_heads=1), CPU)

    def test_equals_the_reference_backend_on_random_batches(self):
        backend, reference = CudaBackend(CPU), SdpaBackend(CPU)
        chooser = random.Random(7)
        for seed in range(6):
            lengths = []
            for _ in range(chooser.randint(1, 5)):
                query = chooser.choice([1, 1, 2, 16, 19])
                lengths.append((query, query + chooser.choice([0, 1, 15, 16, 90])))
            step = Step(lengths, seed=seed)
            torch.testing.assert_close(step.run(backend), step.run(reference))

    def test_a_graphs_plan_follows_its_tensors_and_leaves_padding_rows_zero(self):
        step = cached_decodes([3, 200, 64, 130, 17], torch.float32)
        batch = Decodes(4, 16, step, torch.float32, CPU)
        backend = CudaBackend(CPU)
        plan = backend.plan_decode(batch.slots, batch.tables, batch.lens)
        for members in ([1, 2, 3], [0, 4], [], [3, 2, 1, 0]):
            expected = batch.fill(members)
            output = backend.attend(batch.query, batch.query, batch.query, batch.cache, plan)
            torch.testing.assert_close(output, expected)

    def test_warming_up_writes_no_cache(self):
        step = Step([(1, 1)])
        before = step.cache.key.clone()
        CudaBackend(CPU).warm_up(4, step.cache, 2)
        assert torch.equal(step.cache.key, before)


class TestPlans:
    def test_splits_fill_the_device_and_stay_within_bounds(self):
        for batch in (1, 2, 8, 64, 256, 1024):
            for max_context in (16, 400, 4096, 40960):
                splits, min_split = split_plan(batch * 4, max_context)
                assert 1 <= splits <= MAX_SPLITS
                assert splits == 1 or (splits - 1) * min_split < max_context
        assert split_plan(4, 4096)[0] == MAX_SPLITS
        assert split_plan(256, 4096) == (2, 256)

    def test_tiles_cover_every_row_once_and_start_with_the_longest_context(self):
        query_lens, context_lens = [130, 5, 64], [130, 900, 64]
        numbers = cut_tiles([0, 130, 135], query_lens, context_lens, 64)
        tiles = [numbers[i : i + TILE_FIELDS] for i in range(0, len(numbers), TILE_FIELDS)]
        rows = sorted(row for _, first, count, _ in tiles for row in range(first, first + count))
        assert rows == list(range(199))
        assert tiles[0] == [1, 130, 5, 895]
        assert [tile[3] for tile in tiles] == sorted((tile[3] for tile in tiles), reverse=True)

    def test_a_step_of_one_kind_has_no_other_part(self):
        backend = CudaBackend(CPU)
        decode = AttentionMetadata([1], [17], [[4, 2]], torch.tensor([32]))
        plan = backend.plan(decode, CPU)
        assert plan.chunks is None and plan.prompts == ()
        assert plan.decodes.block_tables.tolist() == [[4, 2]] and plan.decodes.rows.tolist() == [0]
        chunk = AttentionMetadata([2], [2], [[3]], torch.tensor([48, 49]))
        assert backend.plan(chunk, CPU).decodes is None


@pytest.mark.gpu
@needs_gpu
class TestOnCuda:
    @pytest.mark.parametrize("dtype", TOLERANCES)
    @pytest.mark.parametrize("mix", MIXES)
    @pytest.mark.parametrize("head_dim", [8, 64, 128])
    def test_equals_attention_written_out(self, mix, dtype, head_dim):
        assert_equals_written_out(Step(MIXES[mix], head_dim=head_dim), torch.device("cuda"), dtype)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_shapes_of_the_8b_model(self, dtype):
        lengths = [(1, 3600), (1, 401), (151, 151), (1, 1), (1000, 1800), (2100, 2100), (1, 2049), (64, 64)]
        step = Step(lengths, 28, 4, head_dim=128, num_blocks=1000)
        assert_equals_written_out(step, torch.device("cuda"), dtype)

    @pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2), (7, 1), (17, 1)])
    def test_any_grouping_of_heads(self, num_heads, num_kv_heads):
        lengths = [(1, 20), (5, 400), (8, 8), (1, 333)]
        step = Step(lengths, num_heads, num_kv_heads, head_dim=64)
        assert_equals_written_out(step, torch.device("cuda"), torch.bfloat16)

    @pytest.mark.parametrize(
        "lengths", [(4096, 4096), (4200, 4200), (5000, 5000), (3000, 4900), (2500, 5000)]
    )
    def test_warmed_up_prompts_through_cudnn(self, lengths):
        """And last chunks of prompts."""
        device = torch.device("cuda")
        step = Step([lengths], 28, 4, head_dim=128)
        exact = step.expected()
        step.convert(torch.bfloat16)
        backend = CudaBackend(device)
        backend.warm_up(28, step.cache_on(device), 5000)
        assert backend.plan(step.metadata(), device).prompts, "cuDNN refused: see the log"
        for _ in range(2):
            output = step.run(backend, device).float()
            torch.testing.assert_close(output, exact, atol=0.03, rtol=0.03)

    def test_a_prompt_through_cudnn_beside_chunks_and_decodes(self):
        device = torch.device("cuda")
        lengths = [(1, 700), (4300, 4300), (40, 90), (2600, 4100)]
        step = Step(lengths, 28, 4, head_dim=128, num_blocks=1200)
        exact = step.expected()
        step.convert(torch.bfloat16)
        backend = CudaBackend(device)
        backend.warm_up(28, step.cache_on(device), 4608)
        assert len(backend.plan(step.metadata(), device).prompts) == 2
        torch.testing.assert_close(step.run(backend, device).float(), exact, atol=0.03, rtol=0.03)

    def test_replays_of_a_captured_graph_follow_the_contexts(self):
        device = torch.device("cuda")
        contexts = [3, 3600, 64, 1030, 17, 2000, 400, 401]
        step = cached_decodes(
            contexts, torch.bfloat16, num_heads=28, num_kv_heads=4, head_dim=128, num_blocks=600
        )
        batch = Decodes(8, 4096 // BLOCK_SIZE, step, torch.bfloat16, device)
        backend = CudaBackend(device)
        plan = backend.plan_decode(batch.slots, batch.tables, batch.lens)
        batch.fill([0])

        def attend():
            # Twice, as layers do: the counters must be whole again after each.
            backend.attend(batch.query, batch.query, batch.query, batch.cache, plan)
            return backend.attend(batch.query, batch.query, batch.query, batch.cache, plan)

        attend()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = attend()
        for members in ([1, 2, 3], [0, 4], [], [7, 6, 5, 4, 3, 2, 1, 0], [1], [5, 1]):
            expected = batch.fill(members)
            for _ in range(20):
                output.fill_(float("nan"))
                graph.replay()
                torch.testing.assert_close(output.float().cpu(), expected, atol=0.03, rtol=0.03)
