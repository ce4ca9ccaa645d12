"""The fused forward against the modules' own, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from encoder_service.model.fused_vision import FusedVision
from encoder_service.vision import VisionEncoder, normalized_values
from tests.encoder_service.conftest import KINDS, hf_config, hf_tensors
from tests.interpreter import DEVICE, INTERPRETED


def random_tiles(num_tiles: int, side: int = 56) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_tiles)
    return torch.randint(0, 256, (num_tiles, 3, side, side), dtype=torch.uint8, generator=generator)


def run_fused(encoder: VisionEncoder, tiles: torch.Tensor) -> torch.Tensor:
    fused = FusedVision(
        encoder.model.tower, encoder.model.projector, encoder.config, normalized_values(encoder)
    )
    shape = (len(tiles), encoder.config.tokens_per_tile, encoder.config.output_size)
    output = torch.full(shape, torch.nan, dtype=encoder.dtype, device=encoder.device)
    fused.forward(tiles.to(encoder.device), output)
    return output.cpu()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tiles", [1, 3])
def test_it_gives_what_the_modules_give(references, write_checkpoint, kind, num_tiles) -> None:
    model = references[kind]
    checkpoint = write_checkpoint(hf_config(model), hf_tensors(model))
    tiles = random_tiles(num_tiles)
    expected = VisionEncoder.load(checkpoint, "cpu").encode(tiles)
    actual = run_fused(VisionEncoder.load(checkpoint, DEVICE), tiles)
    tolerance = 1e-4 if DEVICE.type == "cpu" else 1e-3
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter cuts bfloat16 off where a GPU rounds")
@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_it_is_as_near_to_float32_as_the_modules_are(references, write_checkpoint, kind) -> None:
    model = references[kind]
    checkpoint = write_checkpoint(hf_config(model), hf_tensors(model))
    tiles = random_tiles(2)
    exact = VisionEncoder.load(checkpoint, "cpu").encode(tiles)
    rounded = VisionEncoder.load(checkpoint, DEVICE, dtype="bfloat16")
    distances = [
        1 - torch.cosine_similarity(exact.flatten(), embeds.float().flatten(), dim=0)
        for embeds in (run_fused(rounded, tiles), rounded.encode(tiles))
    ]
    assert distances[0] < max(1.5 * distances[1], 1e-5)


def test_no_layers_at_all_are_the_embedding(references, write_checkpoint) -> None:
    model = references["300m"]
    checkpoint = write_checkpoint(hf_config(model, vision_feature_layer=0), hf_tensors(model))
    tiles = random_tiles(2)
    expected = VisionEncoder.load(checkpoint, "cpu").encode(tiles)
    actual = run_fused(VisionEncoder.load(checkpoint, DEVICE), tiles)
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)
