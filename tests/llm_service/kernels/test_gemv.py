"""Up to four rows of 16 or 32 bits against the product in float64."""

import pytest
import torch

from llm_service.kernels.gemv import gemv
from llm_service.kernels.linear_config import GemvConfig
from tests.llm_service.kernels.compare import assert_product, operands


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("m", [1, 2, 3, 4])
@pytest.mark.parametrize("n, k", [(5, 40), (16, 32), (7, 65), (9, 96)])
def test_gemv(m, n, k, with_bias, dtype, device):
    x, weight, bias = operands(m, n, k, dtype, device)
    bias = bias if with_bias else None
    assert_product(gemv(x, weight, bias, GemvConfig(4, 32, 1)), x, weight, bias)
