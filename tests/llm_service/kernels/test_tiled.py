"""Products on tensor cores, split or not, against the product in float64."""

import pytest
import torch

from llm_service.kernels.linear_config import TileConfig
from llm_service.kernels.tiled import tiled
from tests.llm_service.kernels.compare import DOT_DTYPES, assert_product, in_float8, operands


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("split_k", [1, 2, 3])
@pytest.mark.parametrize("m, n, k", [(1, 5, 40), (16, 32, 64), (17, 33, 65), (64, 16, 160)])
def test_tiled(m, n, k, split_k, with_bias, dtype, device):
    x, weight, bias = operands(m, n, k, dtype, device)
    bias = bias if with_bias else None
    counters = torch.zeros(16, dtype=torch.int32, device=device)
    config = TileConfig(16, 32, 4, 2, split_k)
    for _ in range(2):  # the second time on counters that the first has left
        assert_product(tiled(x, weight, bias, config, counters), x, weight, bias)
    assert not counters.any()


@pytest.mark.parametrize("dtype", [dtype for dtype in DOT_DTYPES if dtype.itemsize == 2])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("split_k", [1, 2])
@pytest.mark.parametrize("m, n, k", [(3, 5, 48), (17, 33, 80), (64, 16, 160)])
def test_tiles_of_float8(m, n, k, split_k, with_bias, dtype, device):
    x, weight, bias = operands(m, n, k, dtype, device)
    bias = bias if with_bias else None
    values, scale, rounded = in_float8(weight)
    counters = torch.zeros(16, dtype=torch.int32, device=device)
    config = TileConfig(16, 32, 4, 2, split_k)
    for _ in range(2):
        assert_product(tiled(x, values, bias, config, counters, scale=scale), x, rounded, bias)
    assert not counters.any()
