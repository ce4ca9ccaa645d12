"""The largest steps: as large as any that the scheduler may send, and real enough to be run."""

from types import SimpleNamespace

import pytest
import torch

from llm_service.attention.base import select_backend
from llm_service.capacity import resolve_limits
from llm_service.config import EngineConfig
from llm_service.model.config import DecoderConfig
from llm_service.model.weights import load_decoder
from llm_service.parallel import TensorParallel
from llm_service.rehearsal import largest_steps, rehearse
from protos.checkpoint import open_checkpoint
from tests.checkpoints import make_checkpoint


@pytest.mark.parametrize(
    ("budget", "num_seqs", "longest"), [(8192, 256, 32768), (64, 64, 1000), (100, 7, 30), (10, 64, 5)]
)
def test_one_step_has_most_rows_and_the_other_the_longest_chunk_and_context(budget, num_seqs, longest):
    many, one = largest_steps(budget, num_seqs, longest, 16)
    assert len(many.logits_positions) == min(num_seqs, budget)
    assert (one.query_lens, one.context_lens) == ([min(budget, longest)], [longest])
    for step in (many, one):
        assert len(step.token_ids) == sum(step.query_lens) <= budget
        assert all(
            query <= context for query, context in zip(step.query_lens, step.context_lens, strict=True)
        )
        assert all(16 * len(table) >= longest for table in one.block_tables)
        assert step.logits_positions[-1] == len(step.token_ids) - 1


def load(folder, device):
    checkpoint = open_checkpoint(str(folder))
    model, backend = DecoderConfig.from_checkpoint(checkpoint), select_backend("auto", device)
    decoder = load_decoder(checkpoint, model, TensorParallel(), backend, device, torch.float32, "auto")
    return decoder, backend


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnCuda:
    @pytest.fixture
    def decoder(self, tmp_path):
        decoder, backend = load(make_checkpoint(tmp_path, "qwen3", "hf"), torch.device("cuda", 0))
        return SimpleNamespace(decoder=decoder, backend=backend)

    def run(self, decoder, **settings):
        device = torch.device("cuda", 0)
        config = resolve_limits(EngineConfig(**settings), device)
        rehearse(decoder.decoder, decoder.backend, config, TensorParallel(), torch.float32, device)

    def test_the_allocator_keeps_what_the_steps_took(self, decoder):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        self.run(decoder, max_num_seqs=64, max_num_batched_tokens=2048)
        assert torch.cuda.memory_reserved() > before
        assert torch.cuda.memory_allocated() <= before

    def test_steps_that_do_not_fit_are_an_error_that_names_the_settings(self, decoder):
        torch.cuda.set_per_process_memory_fraction(0.0005)
        try:
            with pytest.raises(ValueError, match="max_num_batched_tokens or max_num_seqs"):
                self.run(decoder, max_num_seqs=4096, max_num_batched_tokens=1 << 20)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
