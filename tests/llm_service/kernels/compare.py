"""How far a kernel may be from PyTorch: not at all where every step rounds alike, else one place."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llm_service.model.float8 import FLOAT8, dequantize, quantize_rows
from tests.interpreter import INTERPRETED

# The interpreter cuts bfloat16 off where the device rounds to nearest, and has no bfloat16 matrix product.
CUTS_BFLOAT16 = INTERPRETED
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# The interpreter's tl.dot takes no bfloat16.
DOT_DTYPES = [torch.float32, torch.float16] + ([] if CUTS_BFLOAT16 else [torch.bfloat16])
# (out, in) of a 7B model's layers and of its output matrix.
LAYER_SHAPES = [(4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)]
SHAPES = [*LAYER_SHAPES, (151680, 3584)]
EPSILON = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def assert_places(actual: torch.Tensor, expected: torch.Tensor, places: float, floor: float = 0.0) -> None:
    """Each element within `places` units in the last place, and small ones within `floor` units of 1."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    if CUTS_BFLOAT16 and expected.dtype == torch.bfloat16:
        places, floor = 3 * places + 3, 3 * floor + 1  # of up to three roundings
    unit = EPSILON[expected.dtype]
    difference = (actual.double() - expected.double()).abs()
    # An epsilon of the value is between one and two units in its last place.
    allowed = unit * (places * expected.double().abs() + floor)
    worst = (difference - allowed).max().item() if difference.numel() else 0.0
    assert worst <= 0, f"off by {difference.max().item():.3g}, {(difference > allowed).sum().item()} elements"


def share_equal(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return (actual == expected).double().mean().item()


def operands(
    m: int, n: int, k: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weight, bias"""
    generator = torch.Generator(device).manual_seed(m * n + k)
    x = torch.randn(m, k, generator=generator, device=device).to(dtype)
    weight = torch.randn(n, k, generator=generator, device=device).to(dtype)
    return x, weight, torch.randn(n, generator=generator, device=device).to(dtype)


def in_float8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(values, scale, the matrix that they stand for)"""
    values, scale = torch.empty_like(weight, dtype=FLOAT8), weight.new_empty(len(weight), dtype=torch.float32)
    quantize_rows(weight, values, scale)
    return values, scale, dequantize(values, scale, torch.float32)


def assert_product(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Within two roundings of the result, and of the fp32 sums that made it."""
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert y.dtype == x.dtype and y.shape == exact.shape
    unit = EPSILON[y.dtype] * (2 if CUTS_BFLOAT16 else 1)
    # On the device a float32 tl.dot may round its operands to tf32; nothing dispatches float32 to it.
    sums = 2.0**-20 if y.dtype != torch.float32 or CUTS_BFLOAT16 else 2.0**-9
    allowed = unit * exact.abs() + sums * x.shape[1] ** 0.5 * 8
    assert ((y.double() - exact).abs() <= allowed).all()
