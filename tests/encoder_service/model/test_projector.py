from __future__ import annotations

import pytest
import torch
from transformers import InternVLForConditionalGeneration

from encoder_service.model.projector import pixel_shuffle


def upstream_pixel_shuffle(features: torch.Tensor, factor: int, ps_version: str) -> torch.Tensor:
    """The reshape and permute chain of internvl.md 3.4 (`InternVLChatModel.pixel_shuffle`)."""
    num_tiles, width, height, channels = features.shape
    shuffled = features.view(num_tiles, width, height // factor, channels * factor).permute(0, 2, 1, 3)
    shuffled = shuffled.reshape(num_tiles, height // factor, width // factor, channels * factor**2)
    return shuffled.permute(0, 2, 1, 3) if ps_version == "v2" else shuffled


@pytest.mark.parametrize("ps_version", ["v1", "v2"])
@pytest.mark.parametrize(("side", "factor"), [(4, 2), (32, 2), (8, 4)])
def test_pixel_shuffle_equals_upstreams_reshape_chain(ps_version, side, factor) -> None:
    features = torch.arange(2 * side * side * 3).view(2, side, side, 3)
    expected = upstream_pixel_shuffle(features, factor, ps_version).flatten(1, 2)
    assert torch.equal(pixel_shuffle(features.flatten(1, 2), factor, ps_version), expected)


def test_a_token_joins_its_four_patches_row_by_row() -> None:
    features = torch.arange(16).view(1, 16, 1)  # patch number, 4 x 4
    assert pixel_shuffle(features, 2, "v2")[0, 1].tolist() == [2, 3, 6, 7]


def test_v1_emits_the_tokens_column_by_column() -> None:
    features = torch.randn(2, 64, 5)
    by_row = pixel_shuffle(features, 2, "v2").view(2, 4, 4, 20)
    by_column = pixel_shuffle(features, 2, "v1").view(2, 4, 4, 20)
    assert torch.equal(by_column, by_row.transpose(1, 2))
    assert not torch.equal(by_column, by_row)


def test_v2_equals_transformers(references: dict[str, InternVLForConditionalGeneration]) -> None:
    features = torch.randn(2, 16, 40)
    expected = references["300m"].model.pixel_shuffle(features.view(2, 4, 4, 40)).flatten(1, 2)
    assert torch.equal(pixel_shuffle(features, 2, "v2"), expected)
