from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from encoder_service.model.config import VisionConfig
from encoder_service.model.weights import Destination, destination_of, load_vision_weights
from encoder_service.vision import VisionModel
from protos.checkpoint import Checkpoint, CheckpointError
from tests.encoder_service.conftest import KINDS, chat_config, chat_tensors, hf_config, hf_tensors

BLOCK = "model.vision_tower.encoder.layer.1"


def load(checkpoint: Checkpoint) -> VisionModel:
    config = VisionConfig.from_checkpoint(checkpoint)
    model = VisionModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    load_vision_weights(model, config, checkpoint)
    return model


def respelled(tensors: dict[str, torch.Tensor], respell: Callable[[str], str]) -> dict[str, torch.Tensor]:
    return {respell(name): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_spelling_fills_every_parameter_with_the_same_values(
    references, write_checkpoint, kind
) -> None:
    model = references[kind]
    newer = hf_tensors(model)
    older = respelled(newer, lambda name: name.removeprefix("model."))
    unrenamed = respelled(newer, lambda name: re.sub(r"attention\.([qk]_norm)", r"attn.\1", name))
    loaded = [load(write_checkpoint(hf_config(model), tensors)) for tensors in (newer, older, unrenamed)]
    loaded.append(load(write_checkpoint(chat_config(model), chat_tensors(model))))
    for name, parameter in loaded[0].named_parameters():
        assert parameter.isfinite().all(), name
        for other in loaded[1:]:
            assert torch.equal(parameter, other.get_parameter(name)), name


def test_q_k_and_v_are_the_thirds_of_qkv() -> None:
    prefix = "model.vision_tower.encoder.layer.7.attention"
    qkv = "tower.blocks.7.attn.qkv"
    assert destination_of(f"{prefix}.q_proj.weight") == Destination(f"{qkv}.weight", 0)
    assert destination_of(f"{prefix}.k_proj.bias") == Destination(f"{qkv}.bias", 1)
    assert destination_of(f"{prefix}.v_proj.weight") == Destination(f"{qkv}.weight", 2)
    assert destination_of("vision_model.encoder.layers.7.attn.qkv.bias") == Destination(f"{qkv}.bias")


@pytest.mark.parametrize(
    ("absent", "named"),
    [
        (f"{BLOCK}.lambda_2", "tower.blocks.1.ls2.gamma"),
        (f"{BLOCK}.attention.k_proj.weight", r"tower.blocks.1.attn.qkv.weight \(k\)"),
        ("model.vision_tower.embeddings.cls_token", "tower.cls_token"),
        ("model.multi_modal_projector.linear_2.bias", "projector.fc2.bias"),
    ],
)
def test_a_missing_tensor_is_named(references, write_checkpoint, absent, named) -> None:
    tensors = hf_tensors(references["300m"])
    del tensors[absent]
    with pytest.raises(CheckpointError, match=f"missing.*{named}"):
        load(write_checkpoint(hf_config(references["300m"]), tensors))


@pytest.mark.parametrize(
    "surplus",
    [
        f"{BLOCK}.attention.q_norm.weight",
        "model.vision_tower.layernorm.weight",
        "model.vision_tower.encoder.layer.3.lambda_1",
        "mlp1.2.weight",
    ],
)
def test_an_unused_tensor_is_named(references, write_checkpoint, surplus) -> None:
    tensors = hf_tensors(references["300m"]) | {surplus: torch.zeros(40)}
    with pytest.raises(CheckpointError, match=f"unused.*{re.escape(surplus)}"):
        load(write_checkpoint(hf_config(references["300m"]), tensors))


def test_a_tensor_under_two_spellings_is_refused(references, write_checkpoint) -> None:
    tensors = hf_tensors(references["300m"])
    doubled = "vision_tower.embeddings.cls_token"
    tensors[doubled] = torch.zeros(1, 1, 40)
    with pytest.raises(CheckpointError, match=f"{doubled} is given twice"):
        load(write_checkpoint(hf_config(references["300m"]), tensors))


def test_fused_and_split_qkv_of_one_block_are_refused(references, write_checkpoint) -> None:
    tensors = hf_tensors(references["300m"])
    tensors[f"{BLOCK}.attention.qkv.weight"] = torch.zeros(120, 40)
    with pytest.raises(CheckpointError, match="qkv.weight is given twice"):
        load(write_checkpoint(hf_config(references["300m"]), tensors))


def test_a_wrong_shape_is_named_with_both_shapes(references, write_checkpoint) -> None:
    tensors = hf_tensors(references["300m"])
    tensors[f"{BLOCK}.mlp.fc1.bias"] = torch.zeros(71)
    with pytest.raises(CheckpointError, match=rf"{BLOCK}.mlp.fc1.bias.*\[71\].*\[72\]"):
        load(write_checkpoint(hf_config(references["300m"]), tensors))


@pytest.mark.parametrize("shape", [(680,), (17, 40), (1, 19, 40), (1, 1, 40), (1, 0, 40), ()])
def test_a_position_embedding_that_is_no_grid_is_named(references, write_checkpoint, shape) -> None:
    name = "model.vision_tower.embeddings.position_embeddings"
    tensors = hf_tensors(references["300m"]) | {name: torch.zeros(shape)}
    with pytest.raises(CheckpointError, match=rf"{name} of shape {re.escape(str(list(shape)))}"):
        load(write_checkpoint(hf_config(references["300m"]), tensors))


def test_blocks_behind_the_selected_layer_are_neither_loaded_nor_unused(references, write_checkpoint) -> None:
    config = chat_config(references["6b"], select_layer=-2)
    model = load(write_checkpoint(config, chat_tensors(references["6b"])))
    assert len(model.tower.blocks) == 2


def test_the_position_embedding_is_fitted_to_another_tile_size(references, write_checkpoint) -> None:
    config = chat_config(references["300m"], force_image_size=84)
    model = load(write_checkpoint(config, chat_tensors(references["300m"])))
    stored = references["300m"].model.vision_tower.embeddings.position_embeddings
    assert model.tower.pos_embed.shape == (1, 37, 40)
    assert torch.equal(model.tower.pos_embed[:, 0], stored[:, 0])


def test_only_the_vision_half_is_read(references, write_checkpoint) -> None:
    tensors = chat_tensors(references["300m"]) | {"language_model.model.norm.weight": torch.ones(24)}
    checkpoint = write_checkpoint(chat_config(references["300m"]), tensors)
    read: list[str] = []

    class Watched(Checkpoint):
        def load(self, names):
            for name, tensor in super().load(names):
                read.append(name)
                yield name, tensor

    watched = Watched(checkpoint.folder, checkpoint.config, checkpoint.format, checkpoint.tensors)
    load(watched)
    assert sorted(read) == checkpoint.vision_names()
