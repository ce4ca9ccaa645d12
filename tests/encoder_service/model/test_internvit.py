from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from transformers.models.internvl.modeling_internvl import InternVLVisionRMSNorm

from encoder_service.model.config import VisionConfig
from encoder_service.model.internvit import InternViT, RMSNorm, interpolate_position_embedding

SMALL = VisionConfig(
    hidden_size=48,
    intermediate_size=192,
    num_layers=4,
    num_stored_layers=4,
    num_heads=3,
    patch_size=14,
    image_size=56,
    norm_type="layer_norm",
    norm_eps=1e-6,
    qkv_bias=True,
    qk_norm=False,
    qk_norm_eps=1e-6,
    output_size=8,
    ps_version="v2",
    downsample_ratio=0.5,
)
REAL_300M = replace(
    SMALL, hidden_size=1024, intermediate_size=4096, num_heads=16, num_layers=2, image_size=448
)


def randomize(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.5 if parameter.ndim == 1 else 2 * parameter.shape[-1] ** -0.5
            offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(offset, spread, generator=generator)


def tower_with_weights_of(reference: VisionTransformer, config: VisionConfig) -> InternViT:
    tower = InternViT(config)
    tower.load_state_dict(reference.state_dict())
    return tower.eval()


@torch.inference_mode()
def test_the_tower_equals_timms_vision_transformer() -> None:
    reference = VisionTransformer(
        img_size=56,
        patch_size=14,
        embed_dim=48,
        depth=4,
        num_heads=3,
        init_values=0.1,
        final_norm=False,
        dynamic_img_size=True,
        num_classes=0,
        global_pool="",
    ).eval()
    randomize(reference)
    tower = tower_with_weights_of(reference, SMALL)
    pixels = torch.randn(3, 3, 56, 56)
    torch.testing.assert_close(tower(pixels), reference(pixels)[:, 1:], atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_the_300m_facts_are_timms_vit_intern300m_patch14_448() -> None:
    """By the released name, with two of its layers: names and shapes of all parameters and the features."""
    reference = timm.create_model("vit_intern300m_patch14_448", depth=2, num_classes=0).eval()
    randomize(reference)
    tower = tower_with_weights_of(reference, REAL_300M)
    pixels = torch.randn(1, 3, 448, 448)
    expected = reference.forward_features(pixels)[:, 1:]
    assert expected.shape == (1, 1024, 1024)
    torch.testing.assert_close(tower(pixels), expected, atol=1e-3, rtol=1e-3)


@torch.inference_mode()
@pytest.mark.parametrize("num_layers", [0, 1, 3])
def test_an_earlier_selected_layer_is_that_block_output(num_layers) -> None:
    whole = InternViT(SMALL).eval()
    randomize(whole)
    part = InternViT(replace(SMALL, num_layers=num_layers)).eval()
    part.load_state_dict(whole.state_dict(), strict=False)
    pixels = torch.randn(1, 3, 56, 56)
    hidden = torch.cat((whole.cls_token, whole.patch_embed(pixels)), 1) + whole.pos_embed
    for block in whole.blocks[:num_layers]:
        hidden = block(hidden)
    assert len(part.blocks) == num_layers
    assert torch.equal(part(pixels), hidden[:, 1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_rounds_before_it_multiplies_like_transformers(dtype) -> None:
    reference = InternVLVisionRMSNorm(64, eps=1e-6).to(dtype)
    norm = RMSNorm(64, eps=1e-6).to(dtype)
    randomize(reference)
    norm.load_state_dict(reference.state_dict())
    hidden = (30 * torch.randn(5, 64)).to(dtype)
    assert torch.equal(norm(hidden), reference(hidden))


def test_interpolation_to_the_same_grid_is_the_identity() -> None:
    stored = torch.randn(1, 17, 8)
    torch.testing.assert_close(interpolate_position_embedding(stored, 4), stored)


def test_interpolation_equals_transformers(references) -> None:
    """transformers interpolates in each forward; ours is done once, when the weights are loaded."""
    embeddings = references["300m"].model.vision_tower.embeddings
    stored = embeddings.position_embeddings.detach()
    expected = embeddings.interpolate_pos_encoding(torch.empty(1, 1 + 36, 40), 84, 84)
    actual = interpolate_position_embedding(stored, 6)
    assert actual.shape == (1, 37, 40)
    torch.testing.assert_close(actual, expected)
