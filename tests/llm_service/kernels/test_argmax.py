"""Two passes over blocks find what torch.argmax finds, ties and odd sizes included."""

import pytest
import torch

from llm_service.kernels.argmax import BLOCK, argmax
from tests.llm_service.kernels.compare import CUTS_BFLOAT16, DTYPES

SIZES = [1, 7, BLOCK, BLOCK + 1, 2 * BLOCK + 5, pytest.param(151674, marks=pytest.mark.gpu)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_the_likeliest_token(size, dtype, device):
    if CUTS_BFLOAT16 and size > 4 * BLOCK:
        pytest.skip("needs a CUDA device")
    logits = torch.randn(3, size, generator=torch.Generator().manual_seed(size)).to(dtype).to(device)
    assert torch.equal(argmax(logits), logits.argmax(-1))


@pytest.mark.parametrize("first", [0, 3, BLOCK - 1, BLOCK])
def test_of_equal_ones_the_lowest_id(first, device):
    logits = torch.zeros(2, 2 * BLOCK + 5, device=device)
    logits[:, [first, first + 1, 2 * BLOCK + 4]] = 1.0
    assert argmax(logits).tolist() == [first, first]


def test_rows_may_be_part_of_wider_ones_and_extremes_stay_in_range(device):
    wide = torch.full((4, 40), float("inf"), device=device)
    wide[:, :33] = torch.randn(4, 33, generator=torch.Generator().manual_seed(0)).to(device)
    wide[1, :33] = float("-inf")
    wide[2, 20] = float("nan")
    logits = wide[:, :33]
    assert argmax(logits).tolist() == [int(logits[0].argmax()), 0, 20, int(logits[3].argmax())]
