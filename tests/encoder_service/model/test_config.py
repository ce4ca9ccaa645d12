from __future__ import annotations

from typing import Any

import pytest

from encoder_service.model.config import VisionConfig
from protos.checkpoint import CheckpointError
from tests.encoder_service.conftest import KINDS, chat_config, hf_config


@pytest.mark.parametrize("kind", KINDS)
def test_both_formats_state_the_same_facts(references, write_checkpoint, kind) -> None:
    model = references[kind]
    from_hf = VisionConfig.from_checkpoint(write_checkpoint(hf_config(model), {}))
    from_chat = VisionConfig.from_checkpoint(write_checkpoint(chat_config(model), {}))
    assert from_hf == from_chat
    assert (from_hf.hidden_size, from_hf.num_heads, from_hf.intermediate_size) == (40, 5, 72)
    assert (from_hf.num_layers, from_hf.num_stored_layers) == (3, 3)
    assert (from_hf.projector_input_size, from_hf.output_size) == (160, 24)
    assert from_hf.tokens_per_tile == 4
    assert from_hf.qk_norm is (kind == "6b")
    assert from_hf.qkv_bias is (kind == "300m")


@pytest.mark.parametrize(
    ("selected", "num_layers"), [(-1, 3), (-2, 2), (-3, 1), (-4, 0), (0, 0), (1, 1), (3, 3)]
)
def test_a_selected_layer_bounds_the_layers_that_run(
    references, write_checkpoint, selected, num_layers
) -> None:
    config = chat_config(references["300m"], select_layer=selected)
    assert VisionConfig.from_checkpoint(write_checkpoint(config, {})).num_layers == num_layers


def test_a_tower_older_than_norm_type_is_rms_norm(references, write_checkpoint) -> None:
    config = chat_config(references["6b"])
    del config["vision_config"]["norm_type"]
    assert VisionConfig.from_checkpoint(write_checkpoint(config, {})).norm_type == "rms_norm"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ps_version", "v3"),
        ("select_layer", -5),
        ("select_layer", 4),
        ("downsample_ratio", 0.3),
        ("flash_relative_threshold", 0.1),
        ("vision_config.norm_type", "batch_norm"),
        ("vision_config.hidden_act", "gelu_pytorch_tanh"),
        ("vision_config.model_type", "eva_clip"),
        ("vision_config.num_attention_heads", 3),
    ],
)
def test_an_original_config_with_an_unknown_value_is_refused_by_key(
    references, write_checkpoint, key, value
) -> None:
    checkpoint = write_checkpoint(changed(chat_config(references["300m"]), key, value), {})
    with pytest.raises(CheckpointError, match=key.split(".")[-1]):
        VisionConfig.from_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("projector_hidden_act", "relu"),
        ("vision_feature_select_strategy", "full"),
        ("vision_feature_layer", [1, 2]),
        ("vision_config.use_mean_pooling", False),
        ("vision_config.use_mask_token", True),
        ("vision_config.use_absolute_position_embeddings", False),
        ("vision_config.norm_type", "batch_norm"),
    ],
)
def test_an_hf_config_with_an_unknown_value_is_refused_by_key(
    references, write_checkpoint, key, value
) -> None:
    checkpoint = write_checkpoint(changed(hf_config(references["300m"]), key, value), {})
    with pytest.raises(CheckpointError, match=key.split(".")[-1]):
        VisionConfig.from_checkpoint(checkpoint)


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "qkv_bias", "qk_normalization"])
def test_a_missing_fact_is_named(references, write_checkpoint, key) -> None:
    config = chat_config(references["6b"])
    del config["vision_config"][key]
    with pytest.raises(CheckpointError, match=key):
        VisionConfig.from_checkpoint(write_checkpoint(config, {}))


@pytest.mark.parametrize("make", [chat_config, hf_config])
@pytest.mark.parametrize("section", ["absent", None, [], "vision"])
def test_a_missing_vision_config_is_named(references, write_checkpoint, make, section) -> None:
    config = make(references["300m"])
    del config["vision_config"]
    checkpoint = write_checkpoint(config if section == "absent" else config | {"vision_config": section}, {})
    with pytest.raises(CheckpointError, match="vision_config is missing"):
        VisionConfig.from_checkpoint(checkpoint)


def changed(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    section = config
    *parents, key = path.split(".")
    for parent in parents:
        section = section[parent]
    section[key] = value
    return config
