"""Tiny random InternVL checkpoints, whole: weights, configs, tokenizer and preprocessor, in both formats.

The same seed and family give the same weights in both formats ("internlm2" equals "llama"), so that
one transformers model is the reference for all of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    PreTrainedTokenizerFast,
)

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
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
VOCAB_SIZE = 347  # more rows than the tokenizer has tokens, as Qwen has, and no even number
IMAGE_MEAN = [0.485, 0.456, 0.406]
IMAGE_STD = [0.229, 0.224, 0.225]
PATCH_SIZE = 14
MAX_TILES = 12
TEMPLATES = {
    "qwen2": "internvl2_5",
    "qwen3": "internvl2_5",
    "llama": "Hermes-2",
    "internlm2": "internlm2-chat",
}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<IMG_CONTEXT>\n"
    "{% elif content['type'] == 'video' %}<video>\n"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRAINING_TEXT = (
    "The picture shows a small red house near the lake. What is in the picture? Describe it.\n",
    "<system> user assistant: you are a helpful model that answers questions about images.\n",
    "1234567890 一张图片里有什么？请描述这张图片。 été naïve 🙂\n",
)


def make_checkpoint(
    folder: Path | str,
    family: str,
    format: str,
    *,
    vision: str = "300m",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    image_size: int = 4 * PATCH_SIZE,
    num_layers: int = 2,
    num_shards: int = 2,
    **overrides: Any,
) -> Path:
    """Write a checkpoint of `family` (qwen2, qwen3, llama, internlm2) and return its folder.

    `format` is "hf" (InternVLForConditionalGeneration; no internlm2) or "chat" (InternVLChatModel).
    `overrides` replace fields of the language model's config, such as rope_scaling or num_key_value_heads.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(with_video=format == "hf")
    text = text_config(family, num_layers, tokenizer, overrides)
    model = make_model(text, vision, image_size, tokenizer, seed).to(dtype)
    if format == "hf":
        assert family != "internlm2", "transformers has no InternLM2"
        write_hf(folder, model, tokenizer, image_size, num_shards)
    else:
        write_chat(folder, model, tokenizer, family, image_size, num_shards)
    return folder


def make_tokenizer(with_video: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE with a few merges and InternVL's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256 + 64, initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    special = [*SPECIAL_TOKENS, *(["<video>"] if with_video else [])]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        **(multimodal_tokens() if with_video else {}),
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def multimodal_tokens() -> dict[str, Any]:
    """The fields of the tokenizer that InternVLProcessor reads."""
    return {
        "extra_special_tokens": {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        }
    }


def text_config(
    family: str, num_layers: int, tokenizer: PreTrainedTokenizerFast, overrides: dict[str, Any]
) -> dict[str, Any]:
    """The language model's config.json fields under their transformers names."""
    config: dict[str, Any] = {
        "model_type": "llama" if family == "internlm2" else family,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32 if family == "qwen3" else 16,
        "vocab_size": VOCAB_SIZE,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6 if family.startswith("qwen") else 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "pad_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    }
    return config | overrides


def vision_config(vision: str, image_size: int) -> dict[str, Any]:
    """The tower's config under its transformers names: the shape of the 300M or of the 6B tower."""
    is_6b = vision == "6b"
    return {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": [image_size, image_size],
        "patch_size": [PATCH_SIZE, PATCH_SIZE],
        "hidden_act": "gelu",
        "attention_bias": not is_6b,
        "use_qk_norm": is_6b,
        "norm_type": "rms_norm" if is_6b else "layer_norm",
        "layer_norm_eps": 1e-6,
        "layer_scale_init_value": 0.5,
    }


def make_model(
    text: dict[str, Any],
    vision: str,
    image_size: int,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
) -> InternVLForConditionalGeneration:
    """transformers' InternVL with random weights that make greedy text vary with text and picture."""
    fields = {key: value for key, value in text.items() if key != "model_type"}
    config = InternVLConfig(
        text_config=AutoConfig.for_model(text["model_type"], **fields),
        vision_config=vision_config(vision, image_size),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=tokens_per_tile(image_size),
        downsample_ratio=0.5,
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    model = InternVLForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            parameter.copy_(random_weight(name, parameter, generator))
        if not text["tie_word_embeddings"]:
            # Zero logits never win: no special or unused token appears in greedy text.
            model.lm_head.weight[256 + 64 :] = 0
    return model


def random_weight(name: str, parameter: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Norms near one, biases small, matrices with unit gain, embeddings no stronger than attention."""
    noise = torch.randn(parameter.shape, generator=generator)
    if name.endswith("bias"):
        return 0.1 * noise
    if "language_model" in name and name.endswith(("q_norm.weight", "k_norm.weight")):
        return 2 + 0.1 * noise  # sharp attention, or text would soon repeat
    if "norm" in name:
        return 1 + 0.1 * noise
    if "lambda" in name:
        return 0.5 + 0.1 * noise
    if "embed" in name and "projection" not in name:
        return 0.2 * noise
    gain = 2.0 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.0
    fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
    return gain * noise * fan_in**-0.5


def tokens_per_tile(image_size: int) -> int:
    return (image_size // PATCH_SIZE) ** 2 // 4


def write_hf(
    folder: Path,
    model: InternVLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    image_size: int,
    num_shards: int,
) -> None:
    total = sum(p.numel() * p.element_size() for p in model.state_dict().values())
    model.save_pretrained(folder, max_shard_size=total // num_shards + 1)
    tokenizer.save_pretrained(folder)
    size = {"height": image_size, "width": image_size}
    pixels = {"size": size, "image_mean": IMAGE_MEAN, "image_std": IMAGE_STD, "resample": 3}
    common = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True}
    for file, fields in {
        "preprocessor_config.json": {
            "image_processor_type": "GotOcr2ImageProcessorFast",
            "crop_to_patches": False,  # as released: InternVLProcessor turns it on
            "min_patches": 1,
            "max_patches": MAX_TILES,
            **pixels,
            **common,
        },
        "video_preprocessor_config.json": {
            "video_processor_type": "InternVLVideoProcessor",
            **pixels,
            **common,
        },
        "processor_config.json": {"image_seq_length": tokens_per_tile(image_size)},
    }.items():
        write_json(folder / file, {"processor_class": "InternVLProcessor"} | fields)


def write_chat(
    folder: Path,
    model: InternVLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    family: str,
    image_size: int,
    num_shards: int,
) -> None:
    tokenizer.save_pretrained(folder)
    write_json(folder / "config.json", chat_config(model.config, family, image_size))
    eos = model.config.text_config.eos_token_id
    write_json(folder / "generation_config.json", {"eos_token_id": eos})
    write_shards(folder, original_tensors(model, family), num_shards)


def chat_config(config: InternVLConfig, family: str, image_size: int) -> dict[str, Any]:
    """config.json of InternVLChatModel."""
    vision = config.vision_config
    dtype = str(config.text_config.dtype or torch.float32).removeprefix("torch.")
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "template": TEMPLATES[family],
        "select_layer": -1,
        "ps_version": "v2",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "force_image_size": image_size,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": MAX_TILES,
        "torch_dtype": dtype,
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": vision.num_hidden_layers,
            "num_attention_heads": vision.num_attention_heads,
            "image_size": image_size,
            "patch_size": PATCH_SIZE,
            "hidden_act": "gelu",
            "qkv_bias": vision.attention_bias,
            "qk_normalization": vision.use_qk_norm,
            "norm_type": vision.norm_type,
            "layer_norm_eps": vision.layer_norm_eps,
            "torch_dtype": dtype,
        },
        "llm_config": llm_config(config.text_config, family, dtype),
    }


def llm_config(text: Any, family: str, dtype: str) -> dict[str, Any]:
    """llm_config with the fields and the rope spelling of the years the originals are from."""
    architectures = {
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
        "llama": "LlamaForCausalLM",
        "internlm2": "InternLM2ForCausalLM",
    }
    same = (
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "vocab_size hidden_act rms_norm_eps max_position_embeddings tie_word_embeddings eos_token_id"
    )
    rope = dict(text.rope_parameters)
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    config = {key: getattr(text, key) for key in same.split()} | {
        "architectures": [architectures[family]],
        "model_type": family,
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {"type": kind, **rope},
        "torch_dtype": dtype,
    }
    if family in ("qwen3", "llama"):
        config["head_dim"] = text.head_dim
        config["attention_bias"] = text.attention_bias
    if family == "llama":
        config["mlp_bias"] = text.mlp_bias
    if family == "internlm2":
        config["bias"] = text.attention_bias
    return config


def original_tensors(model: InternVLForConditionalGeneration, family: str) -> dict[str, torch.Tensor]:
    """The model's weights under InternVLChatModel's names."""
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if ".attention.q_proj." in name:
            parts = [state[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            tensors[vision_name(name.replace("q_proj", "qkv"))] = torch.cat(parts)
        elif name.startswith("model.language_model."):
            original = "language_model.model." + name.removeprefix("model.language_model.")
            tensors[original] = tensor
        elif name == "lm_head.weight":
            if not model.config.text_config.tie_word_embeddings:
                tensors["language_model.lm_head.weight"] = tensor
        elif ".attention.k_proj." not in name and ".attention.v_proj." not in name:
            tensors[vision_name(name)] = tensor
    if family == "internlm2":
        tensors = internlm2_tensors(tensors, model.config.text_config)
    return tensors


def vision_name(name: str) -> str:
    """InternVLChatModel's name of a tensor of the tower or the projector."""
    renames = {
        "model.vision_tower.": "vision_model.",
        "embeddings.cls_token": "embeddings.class_embedding",
        "embeddings.position_embeddings": "embeddings.position_embedding",
        "embeddings.patch_embeddings.projection": "embeddings.patch_embedding",
        "encoder.layer.": "encoder.layers.",
        ".attention.projection_layer.": ".attn.proj.",
        ".attention.": ".attn.",
        ".layernorm_before.": ".norm1.",
        ".layernorm_after.": ".norm2.",
        ".lambda_1": ".ls1",
        ".lambda_2": ".ls2",
        "model.multi_modal_projector.layer_norm.": "mlp1.0.",
        "model.multi_modal_projector.linear_1.": "mlp1.1.",
        "model.multi_modal_projector.linear_2.": "mlp1.3.",
    }
    for ours, original in renames.items():
        name = name.replace(ours, original)
    return name


def internlm2_tensors(tensors: dict[str, torch.Tensor], text: Any) -> dict[str, torch.Tensor]:
    """A Llama's tensors packed and named as InternLM2 does."""
    renames = {
        "model.embed_tokens": "model.tok_embeddings",
        "language_model.lm_head": "language_model.output",
        ".self_attn.o_proj": ".attention.wo",
        ".mlp.gate_proj": ".feed_forward.w1",
        ".mlp.down_proj": ".feed_forward.w2",
        ".mlp.up_proj": ".feed_forward.w3",
        ".input_layernorm": ".attention_norm",
        ".post_attention_layernorm": ".ffn_norm",
    }
    packed: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if ".self_attn.q_proj" in name:
            parts = [tensors[name.replace("q_proj", p)] for p in ("q_proj", "k_proj", "v_proj")]
            target = name.replace(".self_attn.q_proj", ".attention.wqkv")
            packed[target] = pack_wqkv(parts, text.num_key_value_heads)
        elif ".self_attn.k_proj" not in name and ".self_attn.v_proj" not in name:
            for llama, internlm2 in renames.items():
                name = name.replace(llama, internlm2)
            packed[name] = tensor
    return packed


def pack_wqkv(parts: list[torch.Tensor], num_kv_heads: int) -> torch.Tensor:
    """q, k and v rows interleaved by kv group: the group's queries, then its key, then its value."""
    groups = [part.unflatten(0, (num_kv_heads, -1)) for part in parts]
    return torch.cat(groups, dim=1).flatten(0, 1)


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], num_shards: int) -> None:
    """Write safetensors files of about equal counts, and the index if there are several."""
    names = sorted(tensors)
    files = [f"model-{i + 1:05d}-of-{num_shards:05d}.safetensors" for i in range(num_shards)]
    if num_shards == 1:
        files = ["model.safetensors"]
    weight_map = {name: files[i * num_shards // len(names)] for i, name in enumerate(names)}
    for file in files:
        shard = {name: tensors[name].contiguous() for name in names if weight_map[name] == file}
        save_file(shard, folder / file, metadata={"format": "pt"})
    if num_shards > 1:
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1))
