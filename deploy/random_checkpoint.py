"""Random checkpoints of any size in `InternVLChatModel`'s format, InternViT-300M and Qwen3 in kind.

Every file is as in a real checkpoint; the weights are noise, and so are the answers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

SEED = 20
PATCH = 14
DTYPE = "bfloat16"
NUM_SHARDS = 2
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class CheckpointShape:
    """Facts of both halves; the defaults of names and kinds are those of InternVL3.5."""

    image_size: int  # pixels of a tile's side
    vision_hidden: int
    vision_intermediate: int
    vision_layers: int
    vision_heads: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int  # at least what the tokenizer has, as in real checkpoints
    max_positions: int = 16384


INTERNVIT_300M_QWEN3_600M = CheckpointShape(
    image_size=448,
    vision_hidden=1024,
    vision_intermediate=4096,
    vision_layers=24,
    vision_heads=16,
    hidden=1024,
    intermediate=3072,
    layers=28,
    heads=16,
    kv_heads=8,
    head_dim=128,
    vocab_size=151936,
)

# Most tokens of the tokenizer, special ones included: TEXT gives it fewer.  Rows beyond them are no token's.
TOKENIZER_SIZE = 768

# Ids in this order behind the words, as Qwen's tokenizers and InternVL's additions have them.
INTERNVL_TOKENS = (
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<quad>",
    "</quad>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *INTERNVL_TOKENS)
# What the byte-level BPE learns its merges from: noise made of words is easier to look at.
TEXT = (
    "The picture shows a small street with a cafe, a red door and a blue bicycle near the window. "
    "What is written on the sign, and what does the coffee cost today? "
    "There is a black cat on the pavement, a green plant beside the wall and a clock above the table. "
    "People sit outside under the awning, drink tea and eat cake while the sun goes down. "
    "Some houses are old, others are new; their windows reflect the light of the sky. "
    "A model that knows nothing about the world still answers in words, one after another, without meaning."
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_random_checkpoint(folder: Path, shape: CheckpointShape) -> Path:
    """Write the checkpoint into `folder` (made if missing): two shards, index, configs, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    end = tokenizer.token_to_id("<|im_end|>")
    assert end is not None
    write_tokenizer(folder, tokenizer, shape.max_positions)
    write_json(folder / "config.json", chat_config(end, shape))
    write_json(folder / "generation_config.json", {"eos_token_id": end})
    write_json(
        folder / "preprocessor_config.json",
        {
            "crop_size": shape.image_size,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
            "resample": 3,
            "size": shape.image_size,
        },
    )
    write_shards(folder, _tensors(tokenizer, shape), NUM_SHARDS)
    return folder


def _tokenizer() -> Tokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def write_tokenizer(folder: Path, tokenizer: Tokenizer, max_positions: int) -> None:
    """tokenizer.json and tokenizer_config.json of a tokenizer that has SPECIAL_TOKENS."""
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    added = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "added_tokens_decoder": {
                str(number): {"content": token, **added} for token, number in tokens.items()
            },
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "model_max_length": max_positions,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def chat_config(eos_token_id: int, shape: CheckpointShape) -> dict[str, Any]:
    """config.json of `InternVLChatModel` with InternViT-300M's and Qwen3's fields."""
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "template": "internvl2_5",
        "select_layer": -1,
        "ps_version": "v2",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "force_image_size": shape.image_size,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "pad2square": False,
        "tie_word_embeddings": False,
        "torch_dtype": DTYPE,
        "vision_config": _vision_config(shape),
        "llm_config": _llm_config(eos_token_id, shape),
    }


def _vision_config(shape: CheckpointShape) -> dict[str, Any]:
    """The fields of InternViT-300M; `model_type` names the 6B tower there, too."""
    return {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "attention_dropout": 0.0,
        "drop_path_rate": 0.0,
        "dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": shape.vision_hidden,
        "image_size": shape.image_size,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": shape.vision_intermediate,
        "layer_norm_eps": 1e-06,
        "norm_type": "layer_norm",
        "num_attention_heads": shape.vision_heads,
        "num_channels": 3,
        "num_hidden_layers": shape.vision_layers,
        "patch_size": PATCH,
        "qk_normalization": False,
        "qkv_bias": True,
        "torch_dtype": DTYPE,
        "use_bfloat16": True,
        "use_flash_attn": True,
    }


def _llm_config(eos_token_id: int, shape: CheckpointShape) -> dict[str, Any]:
    """The fields of Qwen3 in InternVL3.5."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": eos_token_id,
        "eos_token_id": eos_token_id,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.max_positions,
        "max_window_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": DTYPE,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": shape.vocab_size,
    }


def _shapes(shape: CheckpointShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes under their original names, in a fixed order."""
    hidden, vision = shape.hidden, shape.vision_hidden
    patches = (shape.image_size // PATCH) ** 2
    embeddings = "vision_model.embeddings."
    yield embeddings + "class_embedding", (1, 1, vision)
    yield embeddings + "position_embedding", (1, patches + 1, vision)
    yield embeddings + "patch_embedding.weight", (vision, 3, PATCH, PATCH)
    yield embeddings + "patch_embedding.bias", (vision,)
    for layer in range(shape.vision_layers):
        yield from _vision_layer(f"vision_model.encoder.layers.{layer}.", shape)
    yield from _linear("mlp1.0", 4 * vision)
    yield from _linear("mlp1.1", hidden, 4 * vision)
    yield from _linear("mlp1.3", hidden, hidden)
    yield "language_model.model.embed_tokens.weight", (shape.vocab_size, hidden)
    for layer in range(shape.layers):
        yield from _decoder_layer(f"language_model.model.layers.{layer}.", shape)
    yield "language_model.model.norm.weight", (hidden,)
    yield "language_model.lm_head.weight", (shape.vocab_size, hidden)


def _linear(name: str, *shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _vision_layer(layer: str, shape: CheckpointShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, intermediate = shape.vision_hidden, shape.vision_intermediate
    yield layer + "ls1", (hidden,)
    yield layer + "ls2", (hidden,)
    yield from _linear(layer + "norm1", hidden)
    yield from _linear(layer + "norm2", hidden)
    yield from _linear(layer + "attn.qkv", 3 * hidden, hidden)
    yield from _linear(layer + "attn.proj", hidden, hidden)
    yield from _linear(layer + "mlp.fc1", intermediate, hidden)
    yield from _linear(layer + "mlp.fc2", hidden, intermediate)


def _decoder_layer(layer: str, shape: CheckpointShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, intermediate, head_dim = shape.hidden, shape.intermediate, shape.head_dim
    yield layer + "input_layernorm.weight", (hidden,)
    yield layer + "post_attention_layernorm.weight", (hidden,)
    yield layer + "self_attn.q_proj.weight", (shape.heads * head_dim, hidden)
    yield layer + "self_attn.k_proj.weight", (shape.kv_heads * head_dim, hidden)
    yield layer + "self_attn.v_proj.weight", (shape.kv_heads * head_dim, hidden)
    yield layer + "self_attn.o_proj.weight", (hidden, shape.heads * head_dim)
    yield layer + "self_attn.q_norm.weight", (head_dim,)
    yield layer + "self_attn.k_norm.weight", (head_dim,)
    yield layer + "mlp.gate_proj.weight", (intermediate, hidden)
    yield layer + "mlp.up_proj.weight", (intermediate, hidden)
    yield layer + "mlp.down_proj.weight", (hidden, intermediate)


def _tensors(tokenizer: Tokenizer, shape: CheckpointShape) -> dict[str, torch.Tensor]:
    import torch

    generator = torch.Generator().manual_seed(SEED)
    tensors = {name: _weight(name, sizes, generator) for name, sizes in _shapes(shape)}
    # A zero row never wins: answers hold neither special tokens nor pieces of words.
    tensors["language_model.lm_head.weight"][_unspeakable(tokenizer, shape.vocab_size)] = 0
    return tensors


def _weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Norms near one, small biases, matrices of unit gain; sharp logits, so that greedy answers vary."""
    import torch

    noise = torch.randn(shape, generator=generator)
    if name.endswith("bias"):
        noise.mul_(0.1)
    elif len(shape) == 1:
        noise.mul_(0.1).add_(1)
    elif "embed_tokens" in name or "_embedding" in name and "patch" not in name:
        noise.mul_(0.5)
    else:
        noise.mul_((5.0 if "lm_head" in name else 1.0) / math.sqrt(noise[0].numel()))
    return noise.to(getattr(torch, DTYPE))


def _unspeakable(tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """Ids that are neither a whole word of the text nor punctuation."""
    speakable = {f" {word.strip('.,;?')}" for word in TEXT.split()} | set(".,?")
    return [number for number in range(vocab_size) if tokenizer.decode([number]) not in speakable]


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], num_shards: int) -> None:
    """safetensors files of about equal size in the order of `tensors`, and their index."""
    from safetensors.torch import save_file

    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    total, position = sum(sizes.values()), 0
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(num_shards)]
    for name, tensor in tensors.items():
        shards[position * num_shards // total][name] = tensor
        position += sizes[name]
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{num_shards:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_json(path: Path, value: Any) -> None:
    """Indented, as the hub's files are."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
