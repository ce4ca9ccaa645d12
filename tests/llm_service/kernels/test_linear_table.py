"""Every shape has a configuration that fits, by table or by rule, and candidates to measure."""

import pytest

from llm_service.kernels import table_bf16, table_float8
from llm_service.kernels.linear_config import (
    COUNTERS,
    MAX_GEMV_ROWS,
    GemvConfig,
    candidates,
    float8_candidates,
    row_class,
)
from llm_service.kernels.linear_table import configuration, float8_configuration
from tests.llm_service.kernels.compare import SHAPES


def assert_fits(config, rows, n, k, weight_bytes=2):
    if config is None:
        return
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
        assert_fits(configuration(rows, n, k), rows, n, k)
        assert_fits(float8_configuration(rows, n, k), rows, n, k, weight_bytes=1)


@pytest.mark.parametrize("table, weight_bytes", [(table_bf16.TABLE, 2), (table_float8.TABLE, 1)])
def test_the_tables_hold_only_what_is_looked_up(table, weight_bytes):
    for (rows, n, k), config in table.items():
        assert row_class(rows) == rows
        assert_fits(config, rows, n, k, weight_bytes)


@pytest.mark.parametrize("weight_bytes, found", [(1, float8_candidates), (2, candidates)])
@pytest.mark.parametrize("rows", [1, 2, 4, 16, 32, 64])
def test_there_is_something_to_measure_for_every_shape(rows, found, weight_bytes):
    for n, k in SHAPES:
        configs = list(found(rows, n, k))
        assert 4 <= len(configs) == len(set(configs))
        for config in configs:
            assert_fits(config, rows, n, k, weight_bytes)
