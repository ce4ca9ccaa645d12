"""A matrix in float8 stays within the rounding of its elements, whatever its rows' sizes."""

import pytest
import torch

from llm_service.model.float8 import FLOAT8, LARGEST, ROWS_AT_ONCE, dequantize, quantize_rows


def quantized(source):
    values = torch.empty(source.shape, dtype=FLOAT8)
    scale = torch.empty(len(source))
    quantize_rows(source, values, scale)
    return values, scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_each_element_is_off_by_a_sixteenth_of_itself_at_most(dtype):
    sizes = 10.0 ** torch.arange(-4, 4)
    source = (torch.randn(8, 300) * sizes[:, None]).to(dtype)
    values, scale = quantized(source)
    error = (dequantize(values, scale, torch.float32) - source.float()).abs()
    bound = torch.maximum(source.float().abs() / 16, scale[:, None] * 2**-10)
    assert (error <= bound * 1.0001).all()
    assert (error > 0).float().mean() > 0.5  # it is float8 indeed


def test_the_largest_of_a_row_uses_the_whole_range():
    source = torch.randn(5, 64)
    values, scale = quantized(source)
    torch.testing.assert_close(scale, source.abs().amax(1) / LARGEST)
    assert (values.float().abs().amax(1) == LARGEST).all()


def test_what_float8_can_hold_comes_back_exactly():
    source = torch.tensor([[448.0, -1.0, 0.5, 2.0**-9], [896.0, -2.0, 0.0, 26.0]])
    assert torch.equal(dequantize(*quantized(source), torch.float32), source)


def test_a_row_of_zeros_stays_zero_and_one_with_a_nan_shows_it():
    source = torch.zeros(2, 32)
    source[1, 3] = float("nan")
    back = dequantize(*quantized(source), torch.bfloat16)
    assert not back[0].any() and back[1].isnan().any()


def test_rows_beyond_a_block_are_quantised_alike():
    source = torch.randn(ROWS_AT_ONCE + 5, 16)
    values, scale = quantized(source)
    last_values, last_scale = quantized(source[-5:])
    assert torch.equal(values[-5:].float(), last_values.float()) and torch.equal(scale[-5:], last_scale)
