"""Each layer takes its rank's share of a whole tensor, and the shares add up."""

import pytest
import torch
import torch.nn.functional as F

from llm_service.model.float8 import FLOAT8, dequantize, quantize_rows
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


def in_float8(weight):
    """The weight as a quantised layer multiplies by it."""
    values, scale = torch.empty(weight.shape, dtype=FLOAT8), torch.empty(len(weight))
    quantize_rows(weight, values, scale)
    return dequantize(values, scale, torch.float32)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_quantised_layer_holds_its_share_of_every_part_in_float8(rank):
    parallel = TensorParallel(rank, 2)
    qkv = QKVLinear(32, 8, 4, 8, bias=True, parallel=parallel, **PLACE)
    gate_up = GateUpLinear(32, 96, bias=False, parallel=parallel, **PLACE)
    down = RowParallelLinear(96, 32, bias=True, parallel=parallel, **PLACE)
    q, k, v = torch.randn(64, 32), 5 * torch.randn(32, 32), torch.randn(32, 32) / 7
    gate, up, columns, bias = torch.randn(96, 32), torch.randn(96, 32), torch.randn(32, 96), torch.randn(64)
    for layer in (qkv, gate_up, down):
        layer.quantize()
    qkv.load("v", "weight", v)
    qkv.load("q", "weight", q)
    qkv.load("k", "weight", k)
    qkv.load("q", "bias", bias)
    gate_up.load("up", "weight", up)
    gate_up.load("gate", "weight", gate)
    down.load("", "weight", columns)
    down.load("", "bias", bias[:32])
    half = slice(rank * 48, rank * 48 + 48)
    expected = {
        qkv: torch.cat([part.chunk(2)[rank] for part in (q, k, v)]),
        gate_up: torch.cat([gate[half], up[half]]),
        down: columns[:, half],
    }
    for layer, weight in expected.items():
        assert layer.weight.dtype == FLOAT8
        assert torch.equal(dequantize(layer.weight, layer.scale, torch.float32), in_float8(weight))
    assert torch.equal(qkv.bias[:32], bias.chunk(2)[rank])
    assert torch.equal(down.bias, bias[:32] if rank == 0 else torch.zeros(32))
    x = torch.randn(3, 32)
    product = F.linear(x, in_float8(expected[gate_up]))
    torch.testing.assert_close(gate_up(x), product)


@pytest.mark.parametrize("rows, columns", [(24, 32), (32, 24)])
def test_a_shape_that_the_gpu_does_not_multiply_in_float8_stays_as_it_is(rows, columns):
    layer = Linear(columns, rows, bias=False, **PLACE)
    layer.quantize()
    weight = torch.randn(rows, columns)
    layer.put("weight", weight)
    assert layer.scale is None and torch.equal(layer.weight, weight)


def test_a_tensor_of_another_shape_is_refused_by_a_quantised_layer_too():
    layer = RowParallelLinear(32, 16, bias=False, parallel=TensorParallel(), **PLACE)
    layer.quantize()
    with pytest.raises(ValueError, match=r"shape is \[1, 32\], the config says \[16, 32\]"):
        layer.load("", "weight", torch.zeros(1, 32))
