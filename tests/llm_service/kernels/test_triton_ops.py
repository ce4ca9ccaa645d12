"""A decoder on Triton's operations gives the logits of one on PyTorch's."""

import pytest
import torch

from llm_service.attention.base import AttentionMetadata
from llm_service.attention.sdpa import SdpaBackend
from llm_service.kernels.ops import TORCH_OPS
from llm_service.kernels.triton_ops import TritonOps
from llm_service.kv_cache import KVCache
from llm_service.model.config import DecoderConfig
from llm_service.model.decoder import Decoder
from llm_service.model.weights import load_decoder
from llm_service.parallel import TensorParallel
from protos.checkpoint import open_checkpoint
from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.llm_service.kernels.compare import CUTS_BFLOAT16

gpu = pytest.mark.gpu
LAUNCH_EARLY = [False, pytest.param(True, marks=gpu)]
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.15}
# The interpreter's tl.dot takes no bfloat16.
DTYPES = [torch.float32, torch.float16] + ([] if CUTS_BFLOAT16 else [torch.bfloat16])


def load(folder, device, dtype, quantization="none"):
    checkpoint = open_checkpoint(str(folder))
    config = DecoderConfig.from_checkpoint(checkpoint)
    backend = SdpaBackend(device)
    return load_decoder(
        checkpoint, config, TensorParallel(), backend, device, dtype, quantization=quantization
    )


def run(decoder: Decoder, steps: list[torch.Tensor], device, dtype) -> torch.Tensor:
    """Logits of one sequence fed in `steps`."""
    backend = decoder.layers[0].attention.backend
    cache = KVCache.allocate(decoder.config, 8, backend.block_size, TensorParallel(), dtype, device)
    logits, start = [], 0
    with torch.inference_mode():
        for ids in steps:
            end = start + len(ids)
            positions = torch.arange(start, end, device=device)
            metadata = AttentionMetadata([len(ids)], [end], [list(range(8))], positions)
            plan = backend.plan(metadata, device)
            hidden = decoder(decoder.embed(ids.to(device)), positions, cache, plan)
            logits.append(decoder.logits(hidden))
            assert torch.equal(decoder.greedy(hidden), logits[-1].argmax(-1))
            start = end
    return torch.cat(logits)


@pytest.mark.parametrize("early", LAUNCH_EARLY)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_prefill_and_decode_give_the_logits_of_pytorch(family, dtype, early, device, tmp_path):
    decoder = load(make_checkpoint(tmp_path, family, "hf"), device, dtype)
    ids = torch.randint(VOCAB_SIZE, (25,), generator=torch.Generator().manual_seed(0))
    steps = list(ids.split([20, 1, 1, 3]))
    results = []
    for ops in (TritonOps(device, early), TORCH_OPS):
        decoder.use_ops(ops)
        results.append(run(decoder, steps, device, dtype))
    torch.testing.assert_close(*results, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("early", LAUNCH_EARLY)
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype.itemsize == 2])
@pytest.mark.parametrize("family", ["qwen3", *(pytest.param(name, marks=gpu) for name in ("qwen2", "llama"))])
def test_few_rows_in_float8_give_the_logits_of_the_dequantised_weights(
    family, dtype, early, device, tmp_path
):
    """And so the greedy tokens, but for near ties."""
    decoder = load(make_checkpoint(tmp_path, family, "hf"), device, dtype, "fp8")
    ids = torch.randint(VOCAB_SIZE, (25,), generator=torch.Generator().manual_seed(0))
    steps = list(ids.split([20, 1, 1, 3]) if device.type == "cuda" else ids[:4].split([3, 1]))
    results = []
    for ops in (TritonOps(device, early), TORCH_OPS):
        decoder.use_ops(ops)
        results.append(run(decoder, steps, device, dtype))
    tolerance = 2 * TOLERANCE[dtype]  # PyTorch's weights are rounded once more, to this dtype
    torch.testing.assert_close(*results, atol=tolerance, rtol=0)
    assert_greedy_tokens_but_for_ties(*results, tolerance)


@gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_a_long_prefill_in_float8_is_near_that_of_the_dequantised_weights(family, early, device, tmp_path):
    """Its activations are rounded too; the decodes after it read what it has cached."""
    decoder = load(make_checkpoint(tmp_path, family, "hf"), device, torch.bfloat16, "fp8")
    ids = torch.randint(VOCAB_SIZE, (103,), generator=torch.Generator().manual_seed(0))
    results = []
    for ops in (TritonOps(device, early), TORCH_OPS):
        decoder.use_ops(ops)
        results.append(run(decoder, list(ids.split([100, 1, 1, 1])), device, torch.bfloat16))
    ours, theirs = results
    error = (ours - theirs).square().mean() / theirs.square().mean()
    assert error < 0.1, error  # of two tiny layers of large random weights


def assert_greedy_tokens_but_for_ties(ours, theirs, tolerance):
    best, second = theirs.topk(2).values.unbind(-1)
    clear = best - second > 2 * tolerance
    assert torch.equal(ours.argmax(-1)[clear], theirs.argmax(-1)[clear])
