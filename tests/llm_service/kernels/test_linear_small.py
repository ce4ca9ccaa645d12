"""Every kernel for few rows against the product in float64, at odd and at real shapes."""

import pytest
import torch
import torch.nn.functional as F

from llm_service.kernels.linear_small import (
    COUNTERS,
    FLOAT8_TABLE,
    MAX_GEMV_ROWS,
    TABLE,
    GemvConfig,
    SmallLinear,
    TileConfig,
    candidates,
    configuration,
    float8_configuration,
    gemv,
    row_class,
    tiled,
)
from llm_service.model.float8 import FLOAT8, dequantize, quantize_rows
from tests.llm_service.kernels.compare import CUTS_BFLOAT16, EPSILON

gpu = pytest.mark.gpu
SHAPES = [(4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944), (151674, 3584)]
# The interpreter's tl.dot takes no bfloat16.
DOT_DTYPES = [torch.float32, torch.float16] + ([] if CUTS_BFLOAT16 else [torch.bfloat16])


def operands(m, n, k, dtype, device):
    generator = torch.Generator(device).manual_seed(m * n + k)
    x = torch.randn(m, k, generator=generator, device=device).to(dtype)
    weight = torch.randn(n, k, generator=generator, device=device).to(dtype)
    return x, weight, torch.randn(n, generator=generator, device=device).to(dtype)


def in_float8(weight):
    """(values, scale, the matrix that they stand for)"""
    values, scale = torch.empty_like(weight, dtype=FLOAT8), weight.new_empty(len(weight), dtype=torch.float32)
    quantize_rows(weight, values, scale)
    return values, scale, dequantize(values, scale, torch.float32)


def assert_product(y, x, weight, bias):
    """Within two roundings of the result, and of the fp32 sums that made it."""
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert y.dtype == x.dtype and y.shape == exact.shape
    unit = EPSILON[y.dtype] * (2 if CUTS_BFLOAT16 else 1)
    # On the device a float32 tl.dot may round its operands to tf32; nothing dispatches float32 to it.
    sums = 2.0**-20 if y.dtype != torch.float32 or CUTS_BFLOAT16 else 2.0**-9
    allowed = unit * exact.abs() + sums * x.shape[1] ** 0.5 * 8
    assert ((y.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("m", [1, 2, 3, 4])
@pytest.mark.parametrize("n, k", [(5, 40), (16, 32), (7, 65), (9, 96)])
def test_gemv(m, n, k, with_bias, dtype, device):
    x, weight, bias = operands(m, n, k, dtype, device)
    bias = bias if with_bias else None
    assert_product(gemv(x, weight, bias, GemvConfig(4, 32, 1)), x, weight, bias)


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
    assert_product(gemv(x, values, bias, config, scale=scale), x, rounded, bias)


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


def assert_fits(config, rows, n, k, weight_bytes=2):
    if isinstance(config, GemvConfig):
        assert rows <= MAX_GEMV_ROWS and config.block_k == 32 * config.vector * config.num_warps
        assert config.vector * weight_bytes <= 16
        return
    block_m = max(16, row_class(rows))
    assert config.split_k == 1 or -(-n // config.block_n) <= COUNTERS
    stage = (weight_bytes * config.block_n + 2 * block_m) * config.block_k
    assert config.num_stages * stage < 227 << 10
    assert config.split_k <= -(-k // config.block_k)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 16, 17, 32, 33, 64])
def test_every_shape_has_a_configuration_that_fits(rows):
    for n, k in [*SHAPES, (1152, 896), (9728, 896), (896, 4864), (2304, 3584), (7168, 8192)]:
        config = configuration(rows, n, k)
        if config is not None:
            assert_fits(config, rows, n, k)
        assert_fits(float8_configuration(rows, n, k), rows, n, k, weight_bytes=1)


def test_the_table_holds_only_what_is_looked_up():
    for (rows, n, k), config in TABLE.items():
        assert row_class(rows) == rows
        if config is not None:
            assert_fits(config, rows, n, k)
    for (rows, n, k), config in FLOAT8_TABLE.items():
        assert row_class(rows) == rows
        assert_fits(config, rows, n, k, weight_bytes=1)


@pytest.mark.parametrize("weight_bytes", [1, 2])
@pytest.mark.parametrize("rows", [1, 2, 4, 16, 32, 64])
def test_there_is_something_to_measure_for_every_shape(rows, weight_bytes):
    for n, k in SHAPES:
        found = list(candidates(rows, n, k, weight_bytes))
        assert len(found) >= 5
        for config in found:
            assert_fits(config, rows, n, k, weight_bytes)


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
@pytest.mark.parametrize("n, k", SHAPES[:-1])
def test_real_shapes_in_float8(n, k, m, launch, device):
    x, weight, bias = operands(m, n, k, torch.bfloat16, device)
    values, scale, rounded = in_float8(weight * k**-0.5)
    torch.cuda.synchronize()  # as above
    y, expected = (
        SmallLinear(device, launch)(x, values, bias, scale),
        F.linear(x.float(), rounded, bias.float()),
    )
    torch.testing.assert_close(y.float(), expected, atol=2e-3, rtol=2.0**-7)


@gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [1, 2, 4, 16, 64])
@pytest.mark.parametrize("n, k", [(4608, 3584), (3584, 18944)])
def test_every_candidate_of_float8_gives_the_product(n, k, rows, device):
    x, weight, bias = operands(rows, n, k, torch.bfloat16, device)
    values, scale, rounded = in_float8(weight * k**-0.5)
    expected, linear = F.linear(x.float(), rounded, bias.float()), SmallLinear(device)
    for config in candidates(rows, n, k, 1):
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
