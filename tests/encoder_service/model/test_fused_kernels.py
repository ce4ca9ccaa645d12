"""On a GPU or in Triton's interpreter; the reference is the modules that the kernels replace."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from encoder_service.model.fused_kernels import (
    add_and_normalize,
    normalize_query_and_key,
    patchify,
)
from encoder_service.model.internvit import RMSNorm
from encoder_service.tiling import normalize
from tests.interpreter import DEVICE

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DTYPES = (torch.float32, torch.bfloat16)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {"atol": 1e-5, "rtol": 1e-5} if dtype is torch.float32 else {"atol": 2e-2, "rtol": 1e-2}


@pytest.mark.parametrize("dtype", DTYPES)
def test_patchify_is_normalize_and_unfold_exactly(dtype: torch.dtype) -> None:
    tiles = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 256).expand(1, 3, 1, 256).contiguous()
    table = normalize(values, MEAN, STD, dtype).view(3, 256).to(DEVICE)
    patches = patchify(tiles.to(DEVICE), table, patch_size=14, width=640)
    pixels = normalize(tiles, MEAN, STD, dtype).float()
    expected = F.unfold(pixels, 14, stride=14).transpose(1, 2).reshape(8, 588).to(dtype)
    assert torch.equal(patches[:, :588].cpu(), expected)
    assert patches.shape == (8, 640) and not patches[:, 588:].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [40, 64])
@pytest.mark.parametrize("has_branch", [True, False])
def test_layer_norm_after_the_scaled_branch(dtype: torch.dtype, size: int, has_branch: bool) -> None:
    hidden, branch, scale = (
        random(5, size, dtype=dtype),
        random(6, size, dtype=dtype)[:5],
        random(size, dtype=dtype),
    )
    weight, bias = random(size + 1, dtype=dtype)[:size], random(size + 2, dtype=dtype)[:size]
    added = hidden.float() + branch.float() * scale.float() if has_branch else hidden.float()
    expected = F.layer_norm(added.to(dtype).float(), (size,), weight.float(), bias.float(), 1e-6)
    parts = (branch, scale) if has_branch else (None, None)
    normed = add_and_normalize(hidden, *parts, weight, bias, 1e-6)
    torch.testing.assert_close(hidden.float(), added.to(dtype).float(), **tolerance(dtype))
    torch.testing.assert_close(normed.float(), expected, **tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_rounds_where_the_module_does(dtype: torch.dtype) -> None:
    norm = RMSNorm(48, 1e-6).to(DEVICE, dtype).requires_grad_(False)
    norm.weight.copy_(random(48, dtype=dtype))
    hidden = random(7, 48, dtype=dtype)
    expected = norm(hidden)
    normed = add_and_normalize(hidden, None, None, norm.weight, None, norm.eps)
    torch.testing.assert_close(normed, expected, **tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_query_and_key_are_normalised_in_place_and_the_value_is_not(dtype: torch.dtype) -> None:
    norms = [RMSNorm(40, 1e-6).to(DEVICE, dtype).requires_grad_(False) for _ in range(2)]
    norms[0].weight.copy_(random(40, dtype=dtype))
    norms[1].weight.copy_(random(41, dtype=dtype)[:40])
    qkv = random(6, 120, dtype=dtype)
    query, key, value = (part.clone() for part in qkv.chunk(3, dim=-1))
    normalize_query_and_key(qkv, norms[0].weight, norms[1].weight, 1e-6)
    torch.testing.assert_close(qkv[:, :40], norms[0](query), **tolerance(dtype))
    torch.testing.assert_close(qkv[:, 40:80], norms[1](key), **tolerance(dtype))
    assert torch.equal(qkv[:, 80:], value)
