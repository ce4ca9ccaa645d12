"""The trained model is the served one: the services, given its checkpoint, compute the same numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from deploy.demo_training.checkpoint_files import demo_shape, read_shape, write_configs, write_weights
from deploy.demo_training.model import DemoModel
from deploy.demo_training.vocabulary import make_tokenizer
from encoder_service.tiling import normalize
from encoder_service.vision import VisionEncoder
from protos.checkpoint import open_checkpoint
from protos.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from tests.llm_service.model.steps import Runner, load

NUM_TILES, TOKENS_PER_TILE = 2, 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def model(folder: Path) -> DemoModel:
    """Random weights everywhere, each exactly a bfloat16, saved as a training run saves them."""
    tokenizer = make_tokenizer(["what", "is", "the", "sign"])
    shape = dataclasses.replace(demo_shape(tokenizer.get_vocab_size()), vision_layers=2, layers=2)
    write_configs(folder, tokenizer, shape)
    assert read_shape(folder) == shape
    model = DemoModel(shape).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.1 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
            noise = scale * torch.randn(parameter.shape, generator=generator) + (parameter.dim() == 1)
            parameter.copy_(noise.bfloat16())
    write_weights(folder, model.checkpoint_tensors())
    return model


def test_visual_tokens_are_those_of_the_encoder_service(model: DemoModel, folder: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    tiles = torch.randint(256, (NUM_TILES, 3, 224, 224), dtype=torch.uint8, generator=generator)
    served = VisionEncoder.load(open_checkpoint(str(folder)), "cpu", "float32").encode(tiles)
    text = torch.tensor([[7, 8, 9]])
    ids = torch.cat((torch.zeros(1, NUM_TILES * TOKENS_PER_TILE, dtype=torch.int64), text), dim=1)
    everywhere = torch.arange(ids.shape[1])
    with torch.inference_mode():
        pixels = normalize(tiles, IMAGENET_MEAN, IMAGENET_STD, torch.float32)
        trained = model(pixels, ids, everywhere[: NUM_TILES * TOKENS_PER_TILE], everywhere).logits
        decoder = load(folder)
        hidden = torch.cat((served.flatten(0, 1), decoder.embed(text[0])))
        embeds = model.language_model.model.embed_tokens(text)
        whole = torch.cat((served.flatten(0, 1)[None], embeds), dim=1)
        again = model.language_model.lm_head(model.language_model.model(whole))[0]
    torch.testing.assert_close(trained, again, atol=1e-4, rtol=0)
    torch.testing.assert_close(hidden[-3:], embeds[0])


def test_logits_are_those_of_the_language_model_service(model: DemoModel, folder: Path) -> None:
    ids = torch.randint(256, (90,), generator=torch.Generator().manual_seed(3))
    nothing = torch.empty(0, dtype=torch.int64)
    with torch.inference_mode():
        trained = model(torch.empty(0, 3, 224, 224), ids[None], nothing, torch.arange(90)).logits
    torch.testing.assert_close(trained, Runner(load(folder)).step({0: ids})[0], atol=1e-4, rtol=0)


def test_the_training_head_is_not_saved(model: DemoModel) -> None:
    saved = model.checkpoint_tensors()
    assert not any("mark" in name for name in saved)
    assert len(saved) == len(model.state_dict()) - 2
