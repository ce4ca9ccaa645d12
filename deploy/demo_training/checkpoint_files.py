"""The demo checkpoint's files: `InternVLChatModel` with InternViT and Qwen3, as small as it can be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from deploy.random_checkpoint import CheckpointShape, chat_config, write_json, write_shards, write_tokenizer

SYSTEM_MESSAGE = "You are the demo model of Tessera."
MAX_TILES = 6
NUM_SHARDS = 3


def demo_shape(vocab_size: int) -> CheckpointShape:
    """64 visual tokens a tile; 15.6 million parameters with a vocabulary of 640."""
    return CheckpointShape(
        image_size=224,
        vision_hidden=320,
        vision_intermediate=1280,
        vision_layers=6,
        vision_heads=5,
        hidden=384,
        intermediate=832,
        layers=5,
        heads=6,
        kv_heads=2,
        head_dim=64,
        vocab_size=vocab_size,
        max_positions=4096,  # training has at most about 1,000
    )


def write_configs(folder: Path, tokenizer: Tokenizer, shape: CheckpointShape) -> None:
    """Everything but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    end = tokenizer.token_to_id("<|im_end|>")
    assert end is not None
    write_tokenizer(folder, tokenizer, shape.max_positions)
    config = chat_config(end, shape) | {"max_dynamic_patch": MAX_TILES, "system_message": SYSTEM_MESSAGE}
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"eos_token_id": end, "do_sample": False})


def read_shape(folder: Path) -> CheckpointShape:
    """The shape that config.json says."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    vision, text = config["vision_config"], config["llm_config"]
    return CheckpointShape(
        image_size=config["force_image_size"],
        vision_hidden=vision["hidden_size"],
        vision_intermediate=vision["intermediate_size"],
        vision_layers=vision["num_hidden_layers"],
        vision_heads=vision["num_attention_heads"],
        hidden=text["hidden_size"],
        intermediate=text["intermediate_size"],
        layers=text["num_hidden_layers"],
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        head_dim=text["head_dim"],
        vocab_size=text["vocab_size"],
        max_positions=text["max_position_embeddings"],
    )


def write_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """bfloat16, in shards of even size: each stays below what hosts of repositories warn of."""
    rounded = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in tensors.items()
    }
    write_shards(folder, rounded, NUM_SHARDS)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors of every shard; empty where there are none yet."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("model-*.safetensors")):
        tensors |= load_file(file)
    return tensors
