"""Each layer takes its rank's share of a whole tensor, and the shares add up."""

import pytest
import torch
import torch.nn.functional as F

from llm_service.model.layers import (
    GateUpLinear,
    Linear,
    QKVLinear,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from llm_service.parallel import TensorParallel

PLACE = {"dtype": torch.float32, "device": torch.device("cpu")}


def test_qkv_rows_of_all_ranks_cover_every_head_once():
    whole = {"q": torch.randn(8 * 4, 6), "k": torch.randn(4 * 4, 6), "v": torch.randn(4 * 4, 6)}
    seen = {part: [] for part in whole}
    for rank in range(2):
        layer = QKVLinear(6, 8, 4, 4, bias=False, parallel=TensorParallel(rank, 2), **PLACE)
        for part, tensor in whole.items():
            layer.load(part, "weight", tensor)
        for part, rows in zip("qkv", layer.weight.split([16, 8, 8]), strict=True):
            seen[part].append(rows)
    for part, tensor in whole.items():
        assert torch.equal(torch.cat(seen[part]), tensor)


def test_two_ranks_hold_the_same_kv_head_when_there_is_one():
    key = torch.randn(4, 6)
    layers = [
        QKVLinear(6, 2, 1, 4, bias=False, parallel=TensorParallel(rank, 2), **PLACE) for rank in range(2)
    ]
    for layer in layers:
        layer.load("k", "weight", key)
        assert torch.equal(layer.weight[4:8], key)


def test_gate_and_up_are_cut_by_rank():
    gate, up = torch.randn(6, 3), torch.randn(6, 3)
    layer = GateUpLinear(3, 6, bias=False, parallel=TensorParallel(1, 2), **PLACE)
    layer.load("gate", "weight", gate)
    layer.load("up", "weight", up)
    assert torch.equal(layer.weight, torch.cat([gate[3:], up[3:]]))


def test_only_rank_0_holds_the_bias_of_a_summed_layer():
    bias = torch.randn(3)
    for rank in range(2):
        layer = RowParallelLinear(4, 3, bias=True, parallel=TensorParallel(rank, 2), **PLACE)
        layer.load("", "bias", bias)
        assert torch.equal(layer.bias, bias if rank == 0 else torch.zeros(3))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_vocabulary_that_does_not_divide_is_padded_with_zero_rows(size):
    table = torch.randn(10, 3)
    shares = []
    for rank in range(size):
        parallel = TensorParallel(rank, size)
        layer = VocabParallelEmbedding(10, 3, parallel=parallel, **PLACE)
        layer.load("", "weight", table)
        shares.append(layer.weight)
    joined = torch.cat(shares)
    assert torch.equal(joined[:10], table) and not joined[10:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 8, 33])
def test_packing_changes_the_layout_and_not_the_product(dtype, rows):
    layer = Linear(48, 40, bias=True, dtype=dtype, device=torch.device("cpu"))
    weight, bias = torch.randn(40, 48).to(dtype), torch.randn(40).to(dtype)
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
    layer.pack()
    x = torch.randn(rows, 48).to(dtype)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), F.linear(x, weight, bias))


def test_the_norm_multiplies_after_the_cast_as_llama_does():
    norm = RMSNorm(64, eps=1e-6, dtype=torch.bfloat16, device=torch.device("cpu"))
    norm.weight.copy_(torch.randn(64))
    x = torch.randn(5, 64).bfloat16()
    exact = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(norm(x), exact.bfloat16() * norm.weight)


@pytest.mark.parametrize("shape", [(5, 6), (4, 7), (4,)])
def test_a_tensor_of_another_shape_is_refused(shape):
    layer = RowParallelLinear(6, 4, bias=False, parallel=TensorParallel(), **PLACE)
    with pytest.raises(ValueError, match="shape|columns"):
        layer.load("", "weight", torch.zeros(shape))
