"""A step's numbers through a real tiny decoder: visual rows, chunks and batches change nothing."""

import pytest
import torch

from llm_service.attention.base import select_backend
from llm_service.kv_cache import KVCache
from llm_service.messages import StepInput, VisualRows
from llm_service.model.config import DecoderConfig
from llm_service.model.weights import load_decoder
from llm_service.model_runner import ModelRunner
from llm_service.parallel import TensorParallel
from llm_service.visual_memory import VisualMemory
from protos.checkpoint import open_checkpoint
from tests.checkpoints import make_checkpoint

CPU = torch.device("cpu")
NUM_BLOCKS = 12
PROMPT = [7, 8, 0, 0, 0, 0, 0, 0, 9, 10, 11, 12]  # two tiles of three visual tokens
TILES = [VisualRows(2, 1, 0, 3), VisualRows(5, 0, 0, 3)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return open_checkpoint(str(make_checkpoint(tmp_path_factory.mktemp("tiny"), "qwen3", "hf")))


@pytest.fixture
def runner(checkpoint):
    config = DecoderConfig.from_checkpoint(checkpoint)
    backend = select_backend("auto", CPU)
    parallel = TensorParallel()
    decoder = load_decoder(checkpoint, config, parallel, backend, CPU, torch.float32, "auto")
    cache = KVCache.allocate(config, NUM_BLOCKS, backend.block_size, parallel, torch.float32, CPU)
    memory = VisualMemory.create(2, 4, config.hidden_size, torch.float32)
    generator = torch.Generator().manual_seed(0)
    for slot in range(2):
        memory.write(slot, torch.randn(4, config.hidden_size, generator=generator))
    yield ModelRunner(decoder, cache, backend, memory, CPU)
    memory.close()


def chunk(start, end, table, logits):
    """Tokens [start, end) of the prompt, and the visual rows in them."""
    rows = []
    for tile in TILES:
        first, last = max(start, tile.position), min(end, tile.position + 3)
        if first < last:
            rows.append(VisualRows(first - start, tile.slot, first - tile.position, last - first))
    length = end - start
    return StepInput(PROMPT[start:end], [length], [end], [table], rows, [length - 1] if logits else [])


def test_chunks_that_cut_tiles_give_the_logits_of_the_whole(runner):
    whole = runner.forward(chunk(0, 12, [3], logits=True))
    for cut in range(1, 12):
        assert runner.forward(chunk(0, cut, [5], logits=False)).shape[0] == 0
        torch.testing.assert_close(runner.forward(chunk(cut, 12, [5], logits=True)), whole, atol=1e-5, rtol=0)


def test_visual_rows_matter_and_so_does_their_slot(runner):
    step = chunk(0, 12, [3], logits=True)
    right = runner.forward(step)
    swapped = [VisualRows(r.position, 1 - r.slot, r.first_row, r.num_rows) for r in step.visual_rows]
    wrong = StepInput(step.token_ids, [12], [12], [[3]], swapped, [11])
    assert not torch.allclose(runner.forward(wrong), right, atol=1e-3)


def test_a_batch_of_a_chunk_and_a_decode_gives_what_each_gives_alone(runner):
    whole = runner.forward(chunk(0, 12, [3], logits=True))
    first = StepInput([21, 22, 23], [3], [3], [[7]], [], [2])
    runner.forward(first)
    decode = runner.forward(StepInput([24], [1], [4], [[7]], [], [0]))
    runner.forward(first)
    runner.forward(chunk(0, 4, [5], logits=False))
    rest = chunk(4, 12, [5], logits=True)
    rows = [VisualRows(r.position + 1, r.slot, r.first_row, r.num_rows) for r in rest.visual_rows]
    mixed = StepInput([24, *rest.token_ids], [1, 8], [4, 12], [[7], [5]], rows, [0, 8])
    logits = runner.forward(mixed)
    torch.testing.assert_close(logits, torch.cat([decode, whole]), atol=1e-5, rtol=0)


def test_a_block_table_out_of_order_is_followed(runner):
    size = select_backend("auto", CPU).block_size
    prompt = [20 + i % 200 for i in range(size + 3)]

    def logits(table):
        step = StepInput(prompt, [len(prompt)], [len(prompt)], [table], [], [len(prompt) - 1])
        return runner.forward(step)

    torch.testing.assert_close(logits([9, 2]), logits([0, 1]), atol=1e-6, rtol=0)
