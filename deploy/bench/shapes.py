"""Shapes of released models as model folders without weights: what the GPU benchmarks serve.

Configs and a synthetic tokenizer in `InternVLForConditionalGeneration`'s format; the weights are made on the
device (`--load-format dummy`).  INTERNVL3_8B has the facts of the folder that the peers were measured with.
The tokenizer is byte-level and has no merges: one token a character.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.random_checkpoint import INTERNVL_TOKENS, write_json

IMAGE_SIZE = 448
TOKENS_PER_TILE = 256
NUM_WORDS = 151643  # of Qwen2.5's vocabulary, in front of the special tokens
# At their ids in InternVL3, from NUM_WORDS on.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    *INTERNVL_TOKENS,
)


@dataclass(frozen=True)
class Shape:
    """What differs between the folders: keys of the two parts' configs."""

    vision: dict[str, Any]
    language: dict[str, Any]


# InternViT-300M and Qwen2.5-7B.
INTERNVL3_8B = Shape(
    vision={
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "attention_bias": True,
        "use_qk_norm": False,
        "norm_type": "layer_norm",
    },
    language={
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
)
# InternViT-6B and a decoder of InternLM2-20B's dimensions in Qwen2's form, as InternVL2-26B has them.
INTERNVL2_26B = Shape(
    vision={
        "hidden_size": 3200,
        "intermediate_size": 12800,
        "num_hidden_layers": 45,
        "num_attention_heads": 25,
        "attention_bias": False,
        "use_qk_norm": True,
        "norm_type": "rms_norm",
    },
    language={
        "hidden_size": 6144,
        "intermediate_size": 16384,
        "num_hidden_layers": 48,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
    },
)
SHAPES = {"internvl3-8b": INTERNVL3_8B, "internvl2-26b": INTERNVL2_26B}
LANGUAGE_MODEL: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "vocab_size": NUM_WORDS + len(SPECIAL_TOKENS),
    "tie_word_embeddings": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "torch_dtype": "bfloat16",
}
VISION_TOWER: dict[str, Any] = {
    "architectures": ["InternVLVisionModel"],
    "model_type": "internvl_vision",
    "image_size": [IMAGE_SIZE, IMAGE_SIZE],
    "patch_size": [14, 14],
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "use_mean_pooling": True,
    "use_absolute_position_embeddings": True,
    "layer_scale_init_value": 0.1,
    "torch_dtype": "bfloat16",
}
# Without a system message: a text prompt is 19 tokens and its characters.
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<IMG_CONTEXT>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_shape(folder: Path, shape: Shape = INTERNVL3_8B) -> Path:
    """Write the model folder (made if missing)."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", _config(shape))
    write_json(folder / "preprocessor_config.json", _preprocessor())
    write_json(folder / "generation_config.json", {"bos_token_id": 151643, "eos_token_id": 151645})
    _write_tokenizer(folder)
    return folder


def _config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "text_config": LANGUAGE_MODEL | shape.language,
        "vision_config": VISION_TOWER | shape.vision,
        "image_token_id": NUM_WORDS + SPECIAL_TOKENS.index("<IMG_CONTEXT>"),
        "image_seq_length": TOKENS_PER_TILE,
        "downsample_ratio": 0.5,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    }


def _preprocessor() -> dict[str, Any]:
    return {
        "processor_class": "InternVLProcessor",
        "image_processor_type": "GotOcr2ImageProcessorFast",
        "crop_to_patches": True,
        "do_resize": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_convert_rgb": True,
        "min_patches": 1,
        "max_patches": 12,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    }


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"t{number}" for number in range(len(alphabet), NUM_WORDS))]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )
