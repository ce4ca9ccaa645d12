"""Up to four rows and a matrix in float8 against the product with what it stands for."""

import pytest
import torch

from llm_service.kernels.gemv_float8 import gemv_float8
from llm_service.kernels.linear_config import GemvConfig
from tests.llm_service.kernels.compare import assert_product, in_float8, operands


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("m", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "n, k, config",
    [(5, 48, GemvConfig(4, 32, 1)), (9, 96, GemvConfig(2, 64, 1, 16)), (7, 512, GemvConfig(1, 512, 1, 16))],
)
def test_gemv_of_float8(n, k, config, m, with_bias, dtype, device):
    x, weight, bias = operands(m, n, k, dtype, device)
    bias = bias if with_bias else None
    values, scale, rounded = in_float8(weight)
    assert_product(gemv_float8(x, values, bias, scale, config), x, rounded, bias)


def test_every_value_of_float8_is_widened_as_pytorch_does(device):
    """But NaN; each is multiplied by 1 and added to zeros."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    values = values[~values.float().isnan()]
    weight = torch.zeros(len(values), 16).to(values.dtype)
    for column in (0, 5, 10, 15):
        matrix = weight.clone()
        matrix.view(torch.uint8)[:, column] = values.view(torch.uint8)
        ones = torch.ones(1, 16, dtype=torch.float16, device=device)
        scale = torch.ones(len(values), device=device)
        y = gemv_float8(ones, matrix.to(device), None, scale, GemvConfig(4, 32, 1))
        assert torch.equal(y[0].cpu(), values.half())
