"""Tiny random vision halves: a transformers model as the reference, and its weights under any spelling."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import InternVLConfig, InternVLForConditionalGeneration, Qwen2Config

from protos.checkpoint import Checkpoint, open_checkpoint
from tests.encoder_service.kernel_tests import KERNEL_TESTS
from tests.interpreter import CAN_RUN_KERNELS

IMAGE_SIZE = 56
DECODER_TESTS = ("test_video_file.py", "test_pdf_file.py")
KINDS: dict[str, dict[str, Any]] = {
    "300m": {"norm_type": "layer_norm", "use_qk_norm": False, "attention_bias": True},
    "6b": {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False},
}
# transformers' name -> the original one; q, k and v are joined apart from these.
ORIGINAL_NAMES = {
    "vision_tower.embeddings.cls_token": "vision_model.embeddings.class_embedding",
    "vision_tower.embeddings.position_embeddings": "vision_model.embeddings.position_embedding",
    "vision_tower.embeddings.patch_embeddings.projection": "vision_model.embeddings.patch_embedding",
    "vision_tower.encoder.layer": "vision_model.encoder.layers",
    "attention.projection_layer": "attn.proj",
    "attention.q_norm": "attn.q_norm",
    "attention.k_norm": "attn.k_norm",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "lambda_1": "ls1",
    "lambda_2": "ls2",
    "multi_modal_projector.layer_norm": "mlp1.0",
    "multi_modal_projector.linear_1": "mlp1.1",
    "multi_modal_projector.linear_2": "mlp1.3",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if CAN_RUN_KERNELS:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; test_vision.py runs it in Triton's interpreter")
    for item in items:
        if item.path.as_posix().endswith(KERNEL_TESTS):
            item.add_marker(skip)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """What cannot even be imported on a machine without these packages."""
    path = collection_path.as_posix()
    if path.endswith(KERNEL_TESTS) and find_spec("triton") is None:
        return True
    has_decoders = find_spec("av") is not None and find_spec("pypdfium2") is not None
    return True if path.endswith(DECODER_TESTS) and not has_decoders else None


@pytest.fixture(scope="session")
def references() -> dict[str, InternVLForConditionalGeneration]:
    """One transformers model of either kind of tower; every parameter random and of visible size."""
    return {kind: make_reference(kind) for kind in KINDS}


@pytest.fixture
def write_checkpoint(tmp_path: Path) -> Callable[..., Checkpoint]:
    """`write_checkpoint(config, tensors)` -> an opened checkpoint in a new folder."""
    folders = iter(range(100))

    def write(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Checkpoint:
        folder = tmp_path / str(next(folders))
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "preprocessor_config.json").write_text('{"min_patches": 1, "max_patches": 12}')
        save_file(
            {name: tensor.contiguous().clone() for name, tensor in tensors.items()},
            folder / "model.safetensors",
        )
        return open_checkpoint(str(folder))

    return write


def make_reference(kind: str) -> InternVLForConditionalGeneration:
    vision = {
        "hidden_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 5,
        "intermediate_size": 72,
        "image_size": [IMAGE_SIZE, IMAGE_SIZE],
        "patch_size": [14, 14],
    }
    text = Qwen2Config(
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        vocab_size=32,
    )
    config = InternVLConfig(vision_config=vision | KINDS[kind], text_config=text, image_token_id=31)
    model = InternVLForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(len(kind))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(offset, 0.3, generator=generator)
    return model


def hf_config(model: InternVLForConditionalGeneration, **changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(json.dumps(model.config.to_dict()))
    return config | {"architectures": ["InternVLForConditionalGeneration"], "dtype": "float32"} | changes


def hf_tensors(model: InternVLForConditionalGeneration) -> dict[str, torch.Tensor]:
    """The vision half under the names of newer -HF checkpoints ("model.vision_tower...")."""
    return {
        name: tensor.detach()
        for name, tensor in model.named_parameters()
        if "vision_tower" in name or "projector" in name
    }


def chat_config(model: InternVLForConditionalGeneration, **changes: Any) -> dict[str, Any]:
    vision = model.config.vision_config
    config = {
        "architectures": ["InternVLChatModel"],
        "torch_dtype": "float32",
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "select_layer": -1,
        "force_image_size": IMAGE_SIZE,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "llm_config": {"hidden_size": model.config.text_config.hidden_size},
        "vision_config": {
            "model_type": "intern_vit_6b",
            "hidden_size": vision.hidden_size,
            "num_hidden_layers": vision.num_hidden_layers,
            "num_attention_heads": vision.num_attention_heads,
            "intermediate_size": vision.intermediate_size,
            "image_size": IMAGE_SIZE,
            "patch_size": 14,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
            "norm_type": vision.norm_type,
            "qk_normalization": vision.use_qk_norm,
            "qkv_bias": vision.attention_bias,
        },
    }
    return config | changes


def chat_tensors(model: InternVLForConditionalGeneration) -> dict[str, torch.Tensor]:
    """The same vision half under the original names."""
    tensors = {name.removeprefix("model."): tensor for name, tensor in hf_tensors(model).items()}
    joined: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if ".attention.q_proj." in name:
            parts = [tensors[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            joined[name.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
        elif not (".k_proj." in name or ".v_proj." in name):
            joined[name] = tensor
    return {original_name(name): tensor for name, tensor in joined.items()}


def original_name(name: str) -> str:
    for theirs, original in ORIGINAL_NAMES.items():
        name = name.replace(theirs, original)
    return name
