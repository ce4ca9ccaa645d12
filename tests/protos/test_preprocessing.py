"""Tiling settings as both formats spell them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from protos.checkpoint import Checkpoint, CheckpointError, CheckpointFormat
from protos.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

CHAT: dict[str, Any] = {
    "dynamic_image_size": True,
    "use_thumbnail": True,
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 12,
    "downsample_ratio": 0.5,
    "ps_version": "v2",
    "force_image_size": 448,
    "vision_config": {"image_size": 224, "patch_size": 14},
}
HF = {"downsample_ratio": 0.5, "vision_config": {"image_size": [448, 448], "patch_size": [14, 14]}}


def chat(**changes: Any) -> Preprocessing:
    checkpoint = Checkpoint(Path("."), CHAT | changes, CheckpointFormat.CHAT, {})
    return Preprocessing.from_checkpoint(checkpoint)


def hf(folder: Path, **config: Any) -> Preprocessing:
    return Preprocessing.from_checkpoint(Checkpoint(folder, HF | config, CheckpointFormat.HF, {}))


def test_a_dynamic_chat_checkpoint() -> None:
    assert chat() == Preprocessing(448, 14, 0.5, "v2", 1, 12, True, IMAGENET_MEAN, IMAGENET_STD)
    assert chat().tokens_per_tile == 256


def test_without_a_forced_size_the_towers_size_counts() -> None:
    assert chat(force_image_size=None).image_size == 224
    assert chat(force_image_size=None).tokens_per_tile == 64


def test_a_static_chat_checkpoint_has_one_tile_and_no_thumbnail() -> None:
    static = chat(dynamic_image_size=False)
    assert (static.min_tiles, static.max_tiles, static.use_thumbnail) == (1, 1, False)


def test_padding_to_a_square_is_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match="pad2square"):
        chat(pad2square=True)


@pytest.mark.parametrize("inside_processor", [False, True])
def test_an_hf_checkpoint_reads_its_image_processor(tmp_path: Path, inside_processor: bool) -> None:
    image = {"min_patches": 2, "max_patches": 6, "crop_to_patches": False, "image_mean": [0.5, 0.5, 0.5]}
    name = "processor_config.json" if inside_processor else "preprocessor_config.json"
    (tmp_path / name).write_text(json.dumps({"image_processor": image} if inside_processor else image))
    expected = Preprocessing(448, 14, 0.5, "v2", 2, 6, True, (0.5, 0.5, 0.5), IMAGENET_STD)
    assert hf(tmp_path) == expected


def test_an_hf_checkpoint_without_an_image_processor_names_the_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="preprocessor_config.json is missing"):
        hf(tmp_path)


def test_a_tile_that_is_no_square_is_refused(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text('{"max_patches": 6}')
    with pytest.raises(CheckpointError, match=r"image_size \[448, 224\] is not square"):
        hf(tmp_path, vision_config={"image_size": [448, 224], "patch_size": 14})


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        (None, "config.json: vision_config is missing"),
        ({"image_size": 448}, r"config.json: vision_config.patch_size is None, no number"),
    ],
)
def test_a_setting_that_is_missing_is_named(tmp_path: Path, vision: Any, message: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text('{"max_patches": 6}')
    for read in (chat, lambda **changes: hf(tmp_path, **changes)):
        with pytest.raises(CheckpointError, match=message):
            read(vision_config=vision)
