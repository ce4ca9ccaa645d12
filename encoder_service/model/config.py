"""The facts about a vision tower and its projector that a checkpoint's config states, in our words.

Knows both config formats; knows nothing about tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from protos.checkpoint import Checkpoint, CheckpointError, CheckpointFormat
from protos.preprocessing import Preprocessing

NORM_TYPES = ("layer_norm", "rms_norm")
PS_VERSIONS = ("v1", "v2")


@dataclass(frozen=True)
class VisionConfig:
    """Independent facts; none is derived from the size or the name of a model."""

    hidden_size: int
    intermediate_size: int
    num_layers: int  # that run; fewer than stored when an earlier layer's output is selected
    num_stored_layers: int
    num_heads: int
    patch_size: int  # pixels
    image_size: int  # side of a tile, pixels
    norm_type: str  # of the blocks: "layer_norm" or "rms_norm"
    norm_eps: float
    qkv_bias: bool
    qk_norm: bool  # RMSNorm of the whole q and of the whole k, before the heads are split
    qk_norm_eps: float
    output_size: int  # width of the language model
    ps_version: str  # "v1" or "v2": order of the tokens after pixel shuffle
    downsample_ratio: float

    def __post_init__(self) -> None:
        _refuse_unless(self.norm_type in NORM_TYPES, "norm_type", self.norm_type)
        _refuse_unless(self.ps_version in PS_VERSIONS, "ps_version", self.ps_version)
        _refuse_unless(self.hidden_size % self.num_heads == 0, "num_attention_heads", self.num_heads)
        _refuse_unless(self.image_size % self.patch_size == 0, "image_size", self.image_size)
        is_whole = self.shuffle_factor * self.downsample_ratio == 1
        divides = is_whole and self.grid_size % self.shuffle_factor == 0
        _refuse_unless(divides, "downsample_ratio", self.downsample_ratio)

    @property
    def grid_size(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def shuffle_factor(self) -> int:
        """Patches along one side of a visual token."""
        return round(1 / self.downsample_ratio)

    @property
    def tokens_per_tile(self) -> int:
        return (self.grid_size // self.shuffle_factor) ** 2

    @property
    def projector_input_size(self) -> int:
        return self.hidden_size * self.shuffle_factor**2

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> VisionConfig:
        """Raises CheckpointError naming the key that is missing or has a value that is not supported."""
        if checkpoint.format is CheckpointFormat.CHAT:
            return _from_chat(checkpoint)
        return _from_hf(checkpoint)


def _from_chat(checkpoint: Checkpoint) -> VisionConfig:
    """`InternVLChatModel`. Only the norm has a default: towers older than the key are all RMSNorm."""
    config, vision = checkpoint.config, _section(checkpoint, "vision_config")
    _refuse_flash(checkpoint)
    _require(vision, "model_type", "intern_vit_6b", default="intern_vit_6b")
    _require_common(vision)
    preprocessing = Preprocessing.from_checkpoint(checkpoint)
    num_stored = int(_needed(vision, "num_hidden_layers"))
    eps = float(_needed(vision, "layer_norm_eps"))
    return VisionConfig(
        hidden_size=int(_needed(vision, "hidden_size")),
        intermediate_size=int(_needed(vision, "intermediate_size")),
        num_layers=_num_layers(num_stored, config.get("select_layer", -1), "select_layer"),
        num_stored_layers=num_stored,
        num_heads=int(_needed(vision, "num_attention_heads")),
        patch_size=preprocessing.patch_size,
        image_size=preprocessing.image_size,
        norm_type=str(vision.get("norm_type", "rms_norm")),
        norm_eps=eps,
        qkv_bias=bool(_needed(vision, "qkv_bias")),
        qk_norm=bool(_needed(vision, "qk_normalization")),
        qk_norm_eps=eps,
        output_size=int(_needed(_section(checkpoint, "llm_config"), "hidden_size")),
        ps_version=preprocessing.ps_version,
        downsample_ratio=preprocessing.downsample_ratio,
    )


def _from_hf(checkpoint: Checkpoint) -> VisionConfig:
    """`InternVLForConditionalGeneration`; the defaults are those of transformers' InternVLVisionConfig."""
    config, vision = checkpoint.config, _section(checkpoint, "vision_config")
    _require(vision, "model_type", "internvl_vision", default="internvl_vision")
    _require(vision, "use_absolute_position_embeddings", True, default=True)
    _require(vision, "use_mask_token", False, default=False)
    _require(vision, "use_mean_pooling", True, default=True)  # False adds a norm after the last block
    _require(config, "projector_hidden_act", "gelu", default="gelu")
    _require(config, "vision_feature_select_strategy", "default", default="default")
    _require_common(vision)
    preprocessing = Preprocessing.from_checkpoint(checkpoint)
    num_stored = int(_needed(vision, "num_hidden_layers"))
    feature_layer = config.get("vision_feature_layer", -1)
    return VisionConfig(
        hidden_size=int(_needed(vision, "hidden_size")),
        intermediate_size=int(_needed(vision, "intermediate_size")),
        num_layers=_num_layers(num_stored, feature_layer, "vision_feature_layer"),
        num_stored_layers=num_stored,
        num_heads=int(_needed(vision, "num_attention_heads")),
        patch_size=preprocessing.patch_size,
        image_size=preprocessing.image_size,
        norm_type=str(vision.get("norm_type", "layer_norm")),
        norm_eps=float(vision.get("layer_norm_eps", 1e-6)),
        qkv_bias=bool(vision.get("attention_bias", False)),
        qk_norm=bool(vision.get("use_qk_norm", False)),
        qk_norm_eps=1e-6,  # transformers fixes it, whatever layer_norm_eps says
        output_size=int(_needed(_section(checkpoint, "text_config"), "hidden_size")),
        ps_version=preprocessing.ps_version,
        downsample_ratio=preprocessing.downsample_ratio,
    )


def _num_layers(num_stored: int, selected: Any, key: str) -> int:
    """Layers to run for `hidden_states[selected]`, whose index 0 is the embedding: -1 is all of them."""
    in_range = isinstance(selected, int) and -num_stored - 1 <= selected <= num_stored
    _refuse_unless(in_range, key, selected)
    return int(selected) if selected >= 0 else num_stored + 1 + int(selected)


def _refuse_flash(checkpoint: Checkpoint) -> None:
    flash_keys = [key for key in checkpoint.config if key.startswith("flash_")]
    if any(checkpoint.config[key] for key in flash_keys):
        raise CheckpointError(
            f"config.json: {', '.join(flash_keys)}: InternVL3.5-Flash (mlp2, gating) is not supported"
        )


def _require_common(vision: Mapping[str, Any]) -> None:
    _require(vision, "hidden_act", "gelu", default="gelu")
    _require(vision, "num_channels", 3, default=3)


def _section(checkpoint: Checkpoint, key: str) -> Mapping[str, Any]:
    section = checkpoint.config.get(key)
    if not isinstance(section, Mapping):
        raise CheckpointError(f"config.json: {key} is missing")
    return section


def _needed(section: Mapping[str, Any], key: str) -> Any:
    if section.get(key) is None:
        raise CheckpointError(f"config.json: {key} of the vision tower or language model is missing")
    return section[key]


def _require(section: Mapping[str, Any], key: str, supported: Any, *, default: Any) -> None:
    value = section.get(key, default)
    _refuse_unless(value == supported, key, value)


def _refuse_unless(condition: bool, key: str, value: Any) -> None:
    if not condition:
        raise CheckpointError(f"config.json: {key} {value!r} is not supported")
