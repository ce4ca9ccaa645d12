"""Tensors of a checkpoint, under any of its spellings, into the parameters of a vision model.

Knows names and shapes; knows nothing about what the model computes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from encoder_service.model.config import VisionConfig
from encoder_service.model.internvit import interpolate_position_embedding
from protos.checkpoint import Checkpoint, CheckpointError, listing

POSITION_EMBEDDING = "tower.pos_embed"

# Both formats and their older spellings; applied in order, each at most once.
_RENAMES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^vision_model\.|^(model\.)?vision_tower\.", "tower."),
        (r"^mlp1\.0\.|^(model\.)?multi_modal_projector\.layer_norm\.", "projector.norm."),
        (r"^mlp1\.1\.|^(model\.)?multi_modal_projector\.linear_1\.", "projector.fc1."),
        (r"^mlp1\.3\.|^(model\.)?multi_modal_projector\.linear_2\.", "projector.fc2."),
        (r"^tower\.embeddings\.(class_embedding|cls_token)$", "tower.cls_token"),
        (r"^tower\.embeddings\.position_embeddings?$", POSITION_EMBEDDING),
        (
            r"^tower\.embeddings\.(patch_embedding|patch_embeddings\.projection)\.",
            "tower.patch_embed.proj.",
        ),
        (r"^tower\.encoder\.layers?\.", "tower.blocks."),
        (r"\.attention\.", ".attn."),
        (r"\.attn\.projection_layer\.", ".attn.proj."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.(?:ls|lambda_)([12])$", r".ls\1.gamma"),
    )
)
_SPLIT_QKV = re.compile(r"\.attn\.([qkv])_proj\.(weight|bias)$")
_BLOCK = re.compile(r"^tower\.blocks\.(\d+)\.")


@dataclass(frozen=True)
class Destination:
    """A parameter of ours, or the third of it that holds q, k or v."""

    parameter: str
    third: int | None = None


def destination_of(name: str) -> Destination:
    """Where the tensor of that checkpoint name goes; an unknown name leads to no existing parameter."""
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name, count=1)
    split = _SPLIT_QKV.search(name)
    if split is None:
        return Destination(name)
    return Destination(f"{name[: split.start()]}.attn.qkv.{split[2]}", "qkv".index(split[1]))


@torch.no_grad()
def load_vision_weights(model: nn.Module, config: VisionConfig, checkpoint: Checkpoint) -> None:
    """Fill every parameter of `model` from the checkpoint's vision half, on its device and in its dtype.

    Raises:
        CheckpointError: naming the tensors that are missing, unused, given twice or of the wrong shape.
    """
    parameters = dict(model.named_parameters())
    sources = _match(checkpoint.vision_names(), set(parameters), config)
    for name, tensor in checkpoint.load(sources):
        destination = sources[name]
        if destination.parameter == POSITION_EMBEDDING:
            tensor = _fit_position_embedding(name, tensor, config)
        target = _target(parameters, destination)
        if target.shape != tensor.shape:
            raise CheckpointError(
                f"tensor {name} has shape {list(tensor.shape)}; config.json implies {list(target.shape)}"
            )
        target.copy_(tensor)


@torch.no_grad()
def fill_with_random_weights(model: nn.Module) -> None:
    """Small random weights, made on the model's device from a fixed seed, for benchmarks.

    Within 1e-3 of zero, as vLLM's dummy loader chose: activations stay finite in every dtype.
    """
    parameters = list(model.parameters())
    generator = torch.Generator(parameters[0].device).manual_seed(0)
    for parameter in parameters:
        parameter.uniform_(-1e-3, 1e-3, generator=generator)


def _match(names: Iterable[str], parameters: set[str], config: VisionConfig) -> dict[str, Destination]:
    """Checkpoint name -> destination, complete and without left-overs."""
    found = {name: destination_of(name) for name in names}
    found = {name: to for name, to in found.items() if not _is_beyond_selected_layer(to, config)}
    unused = sorted(name for name, to in found.items() if to.parameter not in parameters)
    if unused:
        raise CheckpointError(f"unused tensors in the vision half: {listing(unused)}")
    thirds = {to.parameter for to in found.values() if to.third is not None}
    needed = {
        Destination(parameter, third)
        for parameter in parameters
        for third in ((0, 1, 2) if parameter in thirds else (None,))
    }
    _refuse_missing_and_doubled(found, needed)
    return found


def _refuse_missing_and_doubled(found: dict[str, Destination], needed: set[Destination]) -> None:
    missing = sorted(
        to.parameter if to.third is None else f"{to.parameter} ({'qkv'[to.third]})"
        for to in needed - set(found.values())
    )
    if missing:
        raise CheckpointError(f"tensors missing for the vision model's {listing(missing)}")
    names: dict[Destination, str] = {}
    for name, to in found.items():
        if to in names or to not in needed:
            raise CheckpointError(f"tensor {name} is given twice, also as {names.get(to, to.parameter)}")
        names[to] = name


def _is_beyond_selected_layer(destination: Destination, config: VisionConfig) -> bool:
    block = _BLOCK.match(destination.parameter)
    return block is not None and config.num_layers <= int(block[1]) < config.num_stored_layers


def _fit_position_embedding(name: str, stored: torch.Tensor, config: VisionConfig) -> torch.Tensor:
    num_patches = stored.shape[1] - 1 if stored.ndim == 3 else -1
    if num_patches == config.grid_size**2:
        return stored
    if num_patches < 1 or math.isqrt(num_patches) ** 2 != num_patches:
        raise CheckpointError(f"tensor {name} of shape {list(stored.shape)} is not a square grid and CLS")
    return interpolate_position_embedding(stored, config.grid_size)


def _target(parameters: dict[str, nn.Parameter], destination: Destination) -> torch.Tensor:
    parameter = parameters[destination.parameter]
    if destination.third is None:
        return parameter
    return parameter.chunk(3)[destination.third]
