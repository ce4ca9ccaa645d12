"""How far a kernel may be from PyTorch: not at all where every step rounds alike, else one place."""

from __future__ import annotations

import torch

from tests.interpreter import INTERPRETED

# The interpreter cuts bfloat16 off where the device rounds to nearest, and has no bfloat16 matrix product.
CUTS_BFLOAT16 = INTERPRETED
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
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
