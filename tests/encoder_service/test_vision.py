from __future__ import annotations

import pytest
import torch

from encoder_service.vision import VisionEncoder, resolve_dtype
from tests.encoder_service.conftest import (
    IMAGE_SIZE,
    KINDS,
    chat_config,
    chat_tensors,
    hf_config,
    hf_tensors,
)
from tests.encoder_service.kernel_tests import KERNEL_TESTS
from tests.interpreter import run_in_interpreter, starts_interpreter

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


def random_tiles(num_tiles: int, side: int = IMAGE_SIZE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_tiles)
    return torch.randint(0, 256, (num_tiles, 3, side, side), dtype=torch.uint8, generator=generator)


@torch.inference_mode()
def reference_embeds(model, tiles: torch.Tensor, feature_layer: int = -1) -> torch.Tensor:
    features = model.model.get_image_features(
        (tiles.float() / 255 - MEAN) / STD, vision_feature_layer=feature_layer
    )
    return features.pooler_output


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpoint_format", ["hf", "chat"])
@pytest.mark.parametrize("num_tiles", [1, 5])
def test_visual_embeds_equal_transformers(
    references, write_checkpoint, kind, checkpoint_format, num_tiles
) -> None:
    model = references[kind]
    if checkpoint_format == "hf":
        checkpoint = write_checkpoint(hf_config(model), hf_tensors(model))
    else:
        checkpoint = write_checkpoint(chat_config(model), chat_tensors(model))
    encoder = VisionEncoder.load(checkpoint, "cpu")
    tiles = random_tiles(num_tiles)
    embeds = encoder.encode(tiles)
    assert embeds.shape == (num_tiles, encoder.config.tokens_per_tile, encoder.config.output_size)
    expected = reference_embeds(model, tiles)
    assert expected.abs().mean() > 0.1  # the comparison below means something
    torch.testing.assert_close(embeds, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("feature_layer", [-2, 1])
def test_an_earlier_feature_layer_equals_transformers(references, write_checkpoint, feature_layer) -> None:
    model = references["6b"]
    config = hf_config(model, vision_feature_layer=feature_layer)
    encoder = VisionEncoder.load(write_checkpoint(config, hf_tensors(model)), "cpu")
    tiles = random_tiles(2)
    expected = reference_embeds(model, tiles, feature_layer)
    torch.testing.assert_close(encoder.encode(tiles), expected, atol=1e-4, rtol=1e-4)


def test_tiles_of_another_size_equal_transformers(references, write_checkpoint) -> None:
    """Stored for 56 pixels, served at 84: both interpolate the position embedding."""
    model = references["300m"]
    config = chat_config(model, force_image_size=84)
    encoder = VisionEncoder.load(write_checkpoint(config, chat_tensors(model)), "cpu")
    tiles = random_tiles(1, 84)
    # A grid of 6 patches: transformers' check for 4 is only in its processor.
    torch.testing.assert_close(encoder.encode(tiles), reference_embeds(model, tiles), atol=1e-4, rtol=1e-4)


def test_ps_v1_is_v2_with_the_token_grid_transposed(references, write_checkpoint) -> None:
    model = references["300m"]
    by_version = {}
    for ps_version in ("v1", "v2"):
        checkpoint = write_checkpoint(chat_config(model, ps_version=ps_version), chat_tensors(model))
        by_version[ps_version] = VisionEncoder.load(checkpoint, "cpu").encode(random_tiles(2))
    transposed = by_version["v1"].view(2, 2, 2, 24).transpose(1, 2).reshape(2, 4, 24)
    torch.testing.assert_close(transposed, by_version["v2"])
    assert not torch.allclose(by_version["v1"], by_version["v2"], atol=1e-2)


def test_a_tile_does_not_depend_on_its_batch(references, write_checkpoint) -> None:
    model = references["6b"]
    encoder = VisionEncoder.load(write_checkpoint(hf_config(model), hf_tensors(model)), "cpu")
    tiles = random_tiles(6)
    torch.testing.assert_close(encoder.encode(tiles)[4:5], encoder.encode(tiles[4:5]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_stays_close_to_float32(references, write_checkpoint, kind) -> None:
    model = references[kind]
    checkpoint = write_checkpoint(hf_config(model), hf_tensors(model))
    tiles = random_tiles(2)
    exact = VisionEncoder.load(checkpoint, "cpu").encode(tiles)
    rounded = VisionEncoder.load(checkpoint, "cpu", dtype="bfloat16").encode(tiles)
    assert rounded.dtype is torch.bfloat16
    similarity = torch.cosine_similarity(exact.flatten(), rounded.float().flatten(), dim=0)
    assert similarity > 0.999


@pytest.mark.parametrize(
    ("stated", "requested", "expected"),
    [
        ({"torch_dtype": "bfloat16", "dtype": None}, "auto", torch.bfloat16),
        ({"dtype": "float16"}, "auto", torch.float16),
        ({"dtype": "float16"}, "float32", torch.float32),
        ({"dtype": None}, "auto", torch.bfloat16),
        ({"dtype": "float8_e4m3fn"}, "auto", torch.bfloat16),
        ({"dtype": None, "vision_config": {"dtype": "float16"}}, "auto", torch.float16),
        ({"dtype": None, "text_config": {"dtype": "float32"}}, "auto", torch.float32),
        ({"dtype": None, "llm_config": {"torch_dtype": "float16"}}, "auto", torch.float16),
    ],
)
def test_the_compute_dtype_is_the_checkpoints_unless_asked(
    references, write_checkpoint, stated, requested, expected
) -> None:
    unstated = {"vision_config": {}, "text_config": {}}
    checkpoint = write_checkpoint(hf_config(references["300m"]) | unstated | stated, {})
    assert resolve_dtype(checkpoint, requested) is expected


def test_unknown_dtypes_and_formats_are_refused(references, write_checkpoint) -> None:
    checkpoint = write_checkpoint(hf_config(references["300m"]), {})
    with pytest.raises(ValueError, match="int8"):
        VisionEncoder.load(checkpoint, "cpu", dtype="int8")
    with pytest.raises(ValueError, match="gguf"):
        VisionEncoder.load(checkpoint, "cpu", load_format="gguf")


def test_dummy_weights_need_no_tensors_and_repeat(references, write_checkpoint) -> None:
    checkpoint = write_checkpoint(hf_config(references["6b"]), {})
    first, second = (VisionEncoder.load(checkpoint, "cpu", load_format="dummy") for _ in range(2))
    embeds = first.encode(random_tiles(2))
    assert embeds.isfinite().all() and embeds.abs().sum() > 0
    assert torch.equal(embeds, second.encode(random_tiles(2)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_gives_the_cpus_embeds_on_the_host(references, write_checkpoint, kind) -> None:
    model = references[kind]
    checkpoint = write_checkpoint(hf_config(model), hf_tensors(model))
    tiles = random_tiles(3)
    exact = VisionEncoder.load(checkpoint, "cpu").encode(tiles)
    on_gpu = VisionEncoder.load(checkpoint, "cuda").encode(tiles)
    assert on_gpu.device.type == "cpu"
    torch.testing.assert_close(on_gpu, exact, atol=1e-3, rtol=1e-3)
    rounded = VisionEncoder.load(checkpoint, "cuda", dtype="bfloat16").encode(tiles)
    assert torch.cosine_similarity(exact.flatten(), rounded.float().flatten(), dim=0) > 0.999


@starts_interpreter
def test_what_runs_on_a_gpu_passes_its_tests_in_tritons_interpreter() -> None:
    run_in_interpreter(*KERNEL_TESTS)
