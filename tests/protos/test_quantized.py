"""Visual tokens in 8 bits."""

from __future__ import annotations

import pytest
import torch

from protos.quantized import dequantize, payload_bytes, quantize, quantized_bytes
from protos.tensors import TensorFormatError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_come_back_within_three_bits_of_mantissa(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    embeds = (torch.randn(7, 33) * torch.logspace(-3, 2, 7)[:, None]).to(dtype)
    back = dequantize(quantize(embeds), 7, 33)
    assert back.shape == embeds.shape and back.dtype is torch.float32
    largest = embeds.float().abs().amax(dim=1, keepdim=True)
    # Half a unit in the last of 3 mantissa bits; below the smallest normal value half of the smallest step.
    bound = torch.maximum(embeds.float().abs() / 16, largest * 2**-10 / 448)
    assert ((back - embeds.float()).abs() <= bound * 1.01).all()


def test_the_largest_value_of_a_token_is_exact_and_zeros_stay_zero() -> None:
    embeds = torch.tensor([[0.0, 0.0], [3.0, -1.5], [1e30, 1e20], [1e-30, -1e-30]])
    back = dequantize(quantize(embeds), 4, 2)
    assert torch.allclose(back[:, 0], embeds[:, 0]) and back[0].tolist() == [0, 0]
    assert torch.isfinite(back).all()


def test_takes_half_of_16_bits_and_four_bytes_a_token() -> None:
    assert len(quantize(torch.ones(5, 64, dtype=torch.bfloat16))) == quantized_bytes(5, 64) == 5 * 64 + 20
    assert payload_bytes(torch.float8_e4m3fn, 5, 64) == 5 * 64 + 20
    assert payload_bytes(torch.bfloat16, 5, 64) == 5 * 64 * 2


@pytest.mark.parametrize("size", [0, 33, 35])
def test_another_size_is_refused(size: int) -> None:
    with pytest.raises(TensorFormatError):
        dequantize(bytes(size), 1, 30)
