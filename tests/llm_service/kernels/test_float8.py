"""Rows of x in float8 as PyTorch would make them, and the product of two float8 matrices."""

import pytest
import torch
import torch.nn.functional as F

from llm_service.kernels.float8 import quantize, scaled_product, silu_mul_quantize
from llm_service.kernels.fused import norm_quantize
from llm_service.kernels.ops import TORCH_OPS
from llm_service.model.float8 import FLOAT8, LARGEST, dequantize
from tests.llm_service.kernels.compare import CUTS_BFLOAT16, LAYER_SHAPES, in_float8

gpu = pytest.mark.gpu


def quantized(source):
    return in_float8(source)[:2]


def dequantized(rows):
    return dequantize(rows.values, rows.scale, torch.float32)


def float8_linear(x, weight, bias, scale, launch):
    return scaled_product(quantize(x, launch), weight, bias, scale, x.dtype)


def assert_rounded(rows, exact):
    """To float8, of which one step is an eighth of a number at most."""
    step = torch.maximum(exact.abs() / 8, rows.scale[:, None] * 2**-8)
    near = (dequantized(rows) - exact).abs() <= step
    # The interpreter loses the carry of a number that is rounded up to a power of two.
    assert near.double().mean() > 0.95 if CUTS_BFLOAT16 else near.all()
    assert rows.values.dtype == FLOAT8 and rows.scale.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("m, k", [(1, 16), (3, 80), (5, 512)])
def test_each_row_has_its_own_scale(m, k, dtype, device):
    """Of numbers that float8 holds, which come back exactly: the interpreter rounds others wrongly."""
    generator = torch.Generator().manual_seed(m)
    exact = (100 * torch.randn(m, k, generator=generator)).clamp(-448, 448).to(FLOAT8).float()
    exact[:, 0] = 448.0
    x = (exact * 2.0 ** (torch.arange(m)[:, None] - 6)).to(dtype).to(device)
    rows = quantize(x)
    values, scale = rows.values, rows.scale
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
    rows = quantize(x, launch)
    values, scale = rows.values, rows.scale
    expected_values, expected_scale = quantized(x)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
    ours, theirs = values.float(), expected_values.float()
    step = torch.maximum(theirs.abs() / 8, torch.full_like(theirs, 2.0**-9))
    assert ((ours - theirs).abs() <= step).all()  # where the last bit of a quotient differs, and ties
    assert (ours == theirs).double().mean() > 0.99


def test_a_row_of_zeros_stays_zero(device):
    x = torch.zeros(2, 48, dtype=torch.float16, device=device)
    x[1, 7] = 3.0
    rows = quantize(x)
    values, scale = rows.values, rows.scale
    back = dequantize(values, scale, torch.float32)
    assert not back[0].any() and (scale > 0).all()
    torch.testing.assert_close(back[1], x[1].float())


SIZES = [(3, 48), (2, 100), pytest.param((300, 3584), marks=gpu), pytest.param((300, 18944), marks=gpu)]


def only_small_in_the_interpreter(shape):
    if CUTS_BFLOAT16 and shape[0] > 100:
        pytest.skip("needs a CUDA device")


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", SIZES)
def test_a_norm_is_rounded_and_the_sum_is_not(shape, with_residual, device):
    only_small_in_the_interpreter(shape)
    hidden, residual = (torch.randn(shape).half().to(device) for _ in range(2))
    weight = torch.randn(shape[1]).half().to(device)
    rows, total = norm_quantize(hidden, residual if with_residual else None, weight, 1e-6)
    assert torch.equal(total, hidden + residual if with_residual else hidden)
    exact = TORCH_OPS.rms_norm(total, weight, 1e-6).float()
    assert_rounded(rows, exact)
    torch.testing.assert_close(rows.scale, exact.abs().amax(1) / LARGEST, rtol=2e-3, atol=0)


@pytest.mark.parametrize("shape", SIZES)
def test_swiglu_is_rounded_with_a_scale_that_none_of_a_row_exceeds(shape, device):
    only_small_in_the_interpreter(shape)
    sizes = 10.0 ** (torch.arange(shape[0])[:, None] % 3 - 1)  # not so large that float16 overflows
    gate_up = (torch.randn(shape[0], 2 * shape[1]) * sizes).half().to(device)
    rows = silu_mul_quantize(gate_up)
    exact = TORCH_OPS.silu_mul(gate_up).float()
    assert_rounded(rows, exact)
    bound = rows.scale * LARGEST / exact.abs().amax(1)
    assert (bound >= 1).all() and (bound < 2.1).all()


def test_swiglu_of_zeros_and_of_huge_gates(device):
    gate_up = torch.zeros(3, 64, dtype=torch.float16, device=device)
    gate_up[1, :32] = -60000.0
    gate_up[1, 32:] = 1.0
    gate_up[2, :32] = 60000.0
    gate_up[2, 32:] = 0.5
    back = dequantized(silu_mul_quantize(gate_up))
    assert not back[0].any() and not back[1].any()
    torch.testing.assert_close(back[2], torch.full_like(back[2], 30000.0), rtol=0.07, atol=0)


@gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("launch", [None, {"launch_pdl": True}])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("m", [65, 100, 256, 2668])
@pytest.mark.parametrize("n, k", [*LAYER_SHAPES, (48, 80)])
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
    # Hopper's float8 units keep about 14 bits of a sum, so the error grows with k.
    error = y.float() - exact
    assert error.square().mean().sqrt() < 0.02 and error.abs().max() < 0.2
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
