"""Tiles in, visual embeddings out, on one device. Knows nothing about pictures, requests or threads."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from encoder_service.model.config import VisionConfig
from encoder_service.model.internvit import InternViT
from encoder_service.model.projector import Projector
from encoder_service.model.weights import fill_with_random_weights, load_vision_weights
from encoder_service.tiling import normalize
from protos.checkpoint import Checkpoint
from protos.preprocessing import Preprocessing

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOAD_FORMATS = ("auto", "dummy")


class VisionModel(nn.Module):
    """The vision half of an InternVL checkpoint."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.tower = InternViT(config)
        self.projector = Projector(config)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """[num_tiles, 3, S, S] normalised -> [num_tiles, tokens_per_tile, output_size]"""
        output: torch.Tensor = self.projector(self.tower(pixels))
        return output


class VisionEncoder:
    """A loaded vision model with its normalisation. Calls must not overlap."""

    def __init__(self, model: VisionModel, config: VisionConfig, preprocessing: Preprocessing) -> None:
        self.config = config
        self.preprocessing = preprocessing
        self.model = model.eval().requires_grad_(False)
        self.device = model.tower.cls_token.device
        self.dtype = model.tower.cls_token.dtype

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        device: torch.device | str,
        dtype: str = "auto",
        load_format: str = "auto",
    ) -> VisionEncoder:
        """Read the vision half of a checkpoint.

        Args:
            dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
            load_format: "auto" reads the tensors; "dummy" makes random ones on the device.

        Raises:
            CheckpointError: a fact or a tensor is missing, unused or not supported.
            ValueError: `dtype` or `load_format` is not one of those.
        """
        if load_format not in LOAD_FORMATS:
            raise ValueError(f"load_format {load_format!r} is not one of {', '.join(LOAD_FORMATS)}")
        config = VisionConfig.from_checkpoint(checkpoint)
        with torch.device("meta"):  # no memory and no initialisation before the weights come
            model = VisionModel(config)
        model = model.to(resolve_dtype(checkpoint, dtype)).to_empty(device=device)
        if load_format == "dummy":
            fill_with_random_weights(model)
        else:
            load_vision_weights(model, config, checkpoint)
        return cls(model, config, Preprocessing.from_checkpoint(checkpoint))

    @torch.inference_mode()
    def encode(self, tiles: torch.Tensor) -> torch.Tensor:
        """Visual embeddings of tiles, on the host.

        Args:
            tiles: uint8 [num_tiles, 3, image_size, image_size] on the host.

        Returns:
            [num_tiles, tokens_per_tile, output_size] in the compute dtype, contiguous.
        """
        assert tiles.dtype is torch.uint8 and tiles.shape[1:] == self.tile_shape, tiles.shape
        pixels = normalize(tiles.to(self.device), self.preprocessing.mean, self.preprocessing.std, self.dtype)
        embeds: torch.Tensor = self.model(pixels)
        # Into page-locked memory from the allocator's cache: 32 tiles took 46 ms into fresh pages on an H200.
        host = torch.empty_like(embeds, device="cpu", pin_memory=self.device.type == "cuda")
        return host.copy_(embeds)

    @property
    def hidden_size(self) -> int:
        """Of the language model that reads the embeddings."""
        return self.config.output_size

    @property
    def tile_shape(self) -> tuple[int, int, int]:
        return 3, self.config.image_size, self.config.image_size


def normalized_values(encoder: VisionEncoder) -> torch.Tensor:
    """[3, 256] on the model's device: `normalize` of every value of every channel, by `normalize` itself."""
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 256).expand(1, 3, 1, 256)
    preprocessing = encoder.preprocessing
    pixels = normalize(values.contiguous(), preprocessing.mean, preprocessing.std, encoder.dtype)
    return pixels.view(3, 256).to(encoder.device)


def resolve_dtype(checkpoint: Checkpoint, dtype: str) -> torch.dtype:
    """The compute dtype by name.

    "auto" is what config.json calls `dtype` or, before 5.0, `torch_dtype`, at its top or of one of its
    parts; else bfloat16, as for the language model.
    """
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    config = checkpoint.config
    parts = (config.get(key) for key in ("vision_config", "text_config", "llm_config"))
    for section in (config, *(part for part in parts if isinstance(part, Mapping))):
        stated = section.get("torch_dtype") or section.get("dtype")
        if stated in DTYPES:
            return DTYPES[stated]
    return torch.bfloat16
