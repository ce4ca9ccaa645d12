"""PyTorch's operators are chosen for the CPU, and Triton's agree with them in Triton's interpreter."""

import subprocess
import sys
from pathlib import Path

import torch

from llm_service.kernels.ops import TORCH_OPS, select_ops
from llm_service.kv_cache import LayerCache
from llm_service.model.rope import RopeConfig, RotaryTable
from tests.interpreter import run_in_interpreter, starts_interpreter

FOLDER = Path(__file__).parent


def test_the_cpu_computes_with_pytorch_and_never_imports_the_kernels():
    assert select_ops(torch.device("cpu")) is TORCH_OPS
    code = (
        "import sys, torch, llm_service.model.decoder; from llm_service.kernels.ops import select_ops; "
        "select_ops(torch.device('cpu')); assert 'llm_service.kernels.fused' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=FOLDER.parents[2])


@starts_interpreter
def test_the_kernels_agree_with_pytorch_in_the_interpreter():
    run_in_interpreter(FOLDER)


def test_keys_are_rotated_and_stored_and_values_stored_as_they_are():
    table = RotaryTable(RopeConfig(1e4), 8, 32, torch.float32, torch.device("cpu"))
    cache = LayerCache(torch.zeros(4, 2, 1, 8), torch.zeros(4, 2, 1, 8))
    qkv = torch.randn(2, 5 * 8)
    rotation = TORCH_OPS.rotation(table, torch.tensor([0, 9]))
    slots = torch.tensor([6, 1])
    query, key, value = TORCH_OPS.rotate_and_cache(qkv, rotation, None, 0.0, cache, slots)
    heads = qkv.view(2, 5, 8)
    # Position 0 is not turned; turning keeps lengths.
    assert torch.equal(query[0], heads[0, :3]) and torch.equal(key[0], heads[0, 3:4])
    torch.testing.assert_close(query.norm(dim=-1), heads[:, :3].norm(dim=-1))
    assert not torch.equal(query[1], heads[1, :3])
    assert torch.equal(value, heads[:, 4:])
    assert torch.equal(cache.key.flatten(0, 1)[slots], key)
    assert torch.equal(cache.value.flatten(0, 1)[slots], value)


def test_the_sum_comes_with_its_norm():
    hidden, residual, weight = torch.randn(3, 6), torch.randn(3, 6), torch.randn(6)
    normed, total = TORCH_OPS.add_rms_norm(hidden, residual, weight, 1e-6)
    assert torch.equal(total, hidden + residual)
    assert torch.equal(normed, TORCH_OPS.rms_norm(total, weight, 1e-6))
