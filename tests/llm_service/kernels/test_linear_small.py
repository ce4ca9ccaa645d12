"""Whatever the number of rows, the product; at real shapes on a GPU."""

import pytest
import torch
import torch.nn.functional as F

from llm_service.kernels.linear_config import float8_candidates
from llm_service.kernels.linear_small import SmallLinear
from llm_service.kernels.linear_table import float8_configuration
from tests.llm_service.kernels.compare import LAYER_SHAPES, SHAPES, assert_product, in_float8, operands

gpu = pytest.mark.gpu


@pytest.mark.parametrize("m", [0, 1, 2, 3, 17, 64])
def test_any_few_rows_give_the_product_with_float8(m, device):
    x, weight, bias = operands(m, 40, 64, torch.float16, device)
    values, scale, rounded = in_float8(weight)
    linear = SmallLinear(device)
    assert_product(linear(x, values, bias, scale), x, rounded, bias)
    assert_product(linear(x, values, None, scale), x, rounded, None)


@pytest.mark.parametrize("m", [0, 1, 4, 5, 16, 17, 64, 65])
@pytest.mark.parametrize("n, k", [(40, 64), (37, 24), (9, 13)])
def test_any_number_of_rows_and_columns_gives_the_product(m, n, k, device):
    x, weight, bias = operands(m, n, k, torch.float16, device)
    linear = SmallLinear(device)
    assert_product(linear(x, weight, bias), x, weight, bias)
    assert_product(linear(x, weight), x, weight, None)


@gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("launch", [None, {"launch_pdl": True}])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 8, 16, 32, 33, 64])
@pytest.mark.parametrize("n, k", SHAPES)
def test_real_shapes_in_bfloat16(n, k, m, launch, device):
    x, weight, bias = operands(m, n, k, torch.bfloat16, device)
    weight *= k**-0.5
    torch.cuda.synchronize()  # a kernel that starts early reads weights at once: they must be finished
    linear = SmallLinear(device, launch)
    y, expected = linear(x, weight, bias), F.linear(x.float(), weight.float(), bias.float())
    torch.testing.assert_close(y.float(), expected, atol=2e-3, rtol=2.0**-7)


@gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("launch", [None, {"launch_pdl": True}])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 8, 16, 32, 33, 64])
@pytest.mark.parametrize("n, k", LAYER_SHAPES)
def test_real_shapes_in_float8(n, k, m, launch, device):
    x, weight, bias = operands(m, n, k, torch.bfloat16, device)
    values, scale, rounded = in_float8(weight * k**-0.5)
    torch.cuda.synchronize()  # as above
    y = SmallLinear(device, launch)(x, values, bias, scale).float()
    if float8_configuration(m, n, k) is None:  # x is rounded, too
        error = y - F.linear(in_float8(x)[2], rounded, bias.float())
        assert error.square().mean().sqrt() < 0.02 and error.abs().max() < 0.2
    else:
        expected = F.linear(x.float(), rounded, bias.float())
        torch.testing.assert_close(y, expected, atol=2e-3, rtol=2.0**-7)


@gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [1, 2, 4, 16, 64])
@pytest.mark.parametrize("n, k", [(4608, 3584), (3584, 18944)])
def test_every_candidate_of_float8_gives_the_product(n, k, rows, device):
    x, weight, bias = operands(rows, n, k, torch.bfloat16, device)
    values, scale, rounded = in_float8(weight * k**-0.5)
    expected, linear = F.linear(x.float(), rounded, bias.float()), SmallLinear(device)
    for config in float8_candidates(rows, n, k):
        y = linear.run(x, values, bias, config, scale).float()
        torch.testing.assert_close(y, expected, atol=2e-3, rtol=2.0**-7, msg=str(config))


@gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("launch", [None, {"launch_pdl": True}])
def test_a_captured_chain_of_products_replays_the_same(launch, device):
    """Split products share counters, and each reads what the one before wrote."""
    sizes = [(3584, 3584)] * 12
    weights = [operands(1, n, k, torch.bfloat16, device)[1] * k**-0.5 for n, k in sizes]
    torch.cuda.synchronize()  # as above
    linear = SmallLinear(device, launch)
    for m in (1, 4, 16, 64):
        x = torch.randn(m, 3584, device=device).bfloat16()

        def chain(y):
            for weight in weights:
                y = linear(y, weight)
            return y

        eager = chain(x)
        plain = x
        for weight in weights:
            plain = F.linear(plain, weight)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = chain(x)
        for _ in range(20):
            captured.zero_()
            graph.replay()
            assert torch.equal(captured, eager)
        torch.testing.assert_close(eager, plain, atol=0.1, rtol=0.05)
