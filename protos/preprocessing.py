"""How a checkpoint wants pictures cut: the settings that both halves hash into the fingerprint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from protos.checkpoint import Checkpoint, CheckpointError, CheckpointFormat

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """Upstream's `max_dynamic_patch` and `max_patches` count tiles; they are `max_tiles` here."""

    image_size: int  # side of a tile, pixels
    patch_size: int  # side of a ViT patch, pixels
    downsample_ratio: float
    ps_version: str  # "v1" or "v2": order of the tokens after pixel shuffle
    min_tiles: int
    max_tiles: int
    use_thumbnail: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def tokens_per_tile(self) -> int:
        return int((self.image_size // self.patch_size) ** 2 * self.downsample_ratio**2)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Preprocessing:
        """Raises CheckpointError where a setting is missing or not supported."""
        if checkpoint.format is CheckpointFormat.CHAT:
            return _from_chat(checkpoint)
        return _from_hf(checkpoint)


def _from_chat(checkpoint: Checkpoint) -> Preprocessing:
    """`InternVLChatModel`: the reference code fixes ImageNet statistics and bicubic resizing."""
    config = checkpoint.config
    dynamic = bool(config.get("dynamic_image_size", False))
    if config.get("pad2square"):
        raise CheckpointError("config.json: pad2square is not supported")
    return Preprocessing(
        image_size=_side(checkpoint, "image_size", config.get("force_image_size")),
        patch_size=_side(checkpoint, "patch_size"),
        downsample_ratio=float(config.get("downsample_ratio", 0.5)),
        ps_version=str(config.get("ps_version", "v1")),
        min_tiles=int(config.get("min_dynamic_patch", 1)) if dynamic else 1,
        max_tiles=int(config.get("max_dynamic_patch", 12)) if dynamic else 1,
        use_thumbnail=bool(config.get("use_thumbnail", False)) and dynamic,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


def _from_hf(checkpoint: Checkpoint) -> Preprocessing:
    """`InternVLForConditionalGeneration`: tiling from preprocessor_config.json or processor_config.json.

    Its `crop_to_patches` is ignored: InternVLProcessor turns tiling on whatever the file says.
    """
    processor = checkpoint.read_json("processor_config.json") or {}
    image = checkpoint.read_json("preprocessor_config.json") or processor.get("image_processor")
    if image is None:
        raise CheckpointError(f"{checkpoint.folder}/preprocessor_config.json is missing")
    return Preprocessing(
        image_size=_side(checkpoint, "image_size"),
        patch_size=_side(checkpoint, "patch_size"),
        downsample_ratio=float(checkpoint.config.get("downsample_ratio", 0.5)),
        ps_version="v2",
        min_tiles=int(image.get("min_patches", 1)),
        max_tiles=int(image.get("max_patches", 12)),
        use_thumbnail=True,
        mean=_triple(image.get("image_mean", IMAGENET_MEAN)),
        std=_triple(image.get("image_std", IMAGENET_STD)),
    )


def _side(checkpoint: Checkpoint, name: str, forced: Any = None) -> int:
    """-HF configs spell sides as [height, width]; only squares exist."""
    value = forced or checkpoint.section("vision_config").get(name)
    sides = set(value) if isinstance(value, list | tuple) else {value}
    if len(sides) != 1:
        raise CheckpointError(f"config.json: vision {name} {value} is not square")
    side = sides.pop()
    if not isinstance(side, int):
        raise CheckpointError(f"{checkpoint.folder}/config.json: vision_config.{name} is {side!r}, no number")
    return side


def _triple(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
