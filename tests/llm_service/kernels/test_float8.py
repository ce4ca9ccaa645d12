"""Rows of x in float8 as PyTorch would make them, and the product of two float8 matrices."""

import pytest
import torch
import torch.nn.functional as F

from llm_service.kernels.float8 import float8_linear, quantize
from llm_service.model.float8 import FLOAT8, dequantize, quantize_rows

gpu = pytest.mark.gpu
SHAPES = [(4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)]


def quantized(source):
    values, scale = torch.empty_like(source, dtype=FLOAT8), source.new_empty(len(source), dtype=torch.float32)
    quantize_rows(source, values, scale)
    return values, scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("m, k", [(1, 16), (3, 80), (5, 512)])
def test_each_row_has_its_own_scale(m, k, dtype, device):
    """Of numbers that float8 holds, which come back exactly: the interpreter rounds others wrongly."""
    generator = torch.Generator().manual_seed(m)
    exact = (100 * torch.randn(m, k, generator=generator)).clamp(-448, 448).to(FLOAT8).float()
    exact[:, 0] = 448.0
    x = (exact * 2.0 ** (torch.arange(m)[:, None] - 6)).to(dtype).to(device)
    values, scale = quantize(x)
    assert values.dtype == FLOAT8
    assert torch.equal(values.float(), exact.to(device))
    assert torch.equal(scale, 2.0 ** (torch.arange(m, device=device) - 6))


@gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("launch", [None, {"launch_pdl": True}])
@pytest.mark.parametrize("m, k", [(1, 16), (65, 3584), (300, 18944)])
def test_rows_are_rounded_as_pytorch_rounds(m, k, launch, device):
    sizes = 10.0 ** (torch.arange(m, device=device) % 6 - 3)
    x = (torch.randn(m, k, device=device) * sizes[:, None]).bfloat16()
    values, scale = quantize(x, launch)
    expected_values, expected_scale = quantized(x)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
    ours, theirs = values.float(), expected_values.float()
    step = torch.maximum(theirs.abs() / 8, torch.full_like(theirs, 2.0**-9))
    assert ((ours - theirs).abs() <= step).all()  # where the last bit of a quotient differs, and ties
    assert (ours == theirs).double().mean() > 0.99


def test_a_row_of_zeros_stays_zero(device):
    x = torch.zeros(2, 48, dtype=torch.float16, device=device)
    x[1, 7] = 3.0
    values, scale = quantize(x)
    back = dequantize(values, scale, torch.float32)
    assert not back[0].any() and (scale > 0).all()
    torch.testing.assert_close(back[1], x[1].float())


@gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("launch", [None, {"launch_pdl": True}])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("m", [65, 100, 256, 2668])
@pytest.mark.parametrize("n, k", [*SHAPES, (48, 80)])
def test_products_of_many_rows(n, k, m, with_bias, launch, device):
    generator = torch.Generator(device).manual_seed(m + n)
    x = torch.randn(m, k, generator=generator, device=device).bfloat16()
    weight = torch.randn(n, k, generator=generator, device=device).bfloat16() * k**-0.5
    bias = torch.randn(n, generator=generator, device=device).bfloat16() if with_bias else None
    values, scale = quantized(weight)
    y = float8_linear(x, values, bias, scale, launch)
    assert y.dtype == torch.bfloat16 and y.shape == (m, n)
    # Against the product of the same rounded operands: what is left are the sums.
    rounded = dequantize(*quantized(x), torch.float32)
    exact = F.linear(
        rounded, dequantize(values, scale, torch.float32), None if bias is None else bias.float()
    )
    torch.testing.assert_close(y.float(), exact, atol=0.03, rtol=0.02)
    # Against the product of the operands as they were: the errors of two roundings of 4 bits, averaged.
    plain = F.linear(x, weight, bias).float()
    assert (y.float() - plain).square().mean().sqrt() < 0.05 * (plain.square().mean().sqrt())


@gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_product_replays_the_same(device):
    x = torch.randn(128, 3584, device=device).bfloat16()
    values, scale = quantized(torch.randn(3584, 3584, device=device) * 3584**-0.5)
    launch = {"launch_pdl": True}
    eager = float8_linear(float8_linear(x, values, None, scale, launch), values, None, scale, launch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = float8_linear(float8_linear(x, values, None, scale, launch), values, None, scale, launch)
    for _ in range(5):
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, eager)
