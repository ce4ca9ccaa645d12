"""The tiny checkpoints are whole: transformers' own classes open the -HF ones, text and picture matter."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, InternVLForConditionalGeneration

from protos.checkpoint import open_checkpoint
from protos.preprocessing import Preprocessing
from tests.checkpoints import SPECIAL_TOKENS, make_checkpoint


def answer(folder, pixels):
    """48 greedy tokens of transformers about one picture."""
    processor = AutoProcessor.from_pretrained(folder)
    model = InternVLForConditionalGeneration.from_pretrained(folder).eval()
    content = [
        {"type": "image", "image": Image.fromarray(pixels)},
        {"type": "text", "text": "What is in the picture?"},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 4 * len(inputs["pixel_values"])
    return output[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("vision", ["300m", "6b"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_answers_vary_and_depend_on_the_picture(family, vision, tmp_path):
    folder = make_checkpoint(tmp_path, family, "hf", vision=vision)
    noise = np.random.default_rng(0).integers(0, 255, (2, 60, 80, 3), dtype=np.uint8)
    first, second = answer(folder, noise[0]), answer(folder, noise[1])
    assert first != second and len(set(first)) > 12 and len(set(second)) > 12


@pytest.mark.parametrize("format", ["hf", "chat"])
def test_both_formats_open_with_the_same_tiling_and_tokens(format, tmp_path):
    folder = make_checkpoint(tmp_path, "qwen2", format)
    checkpoint = open_checkpoint(str(folder))
    assert Preprocessing.from_checkpoint(checkpoint).tokens_per_tile == 4
    assert checkpoint.vision_names() and checkpoint.language_names()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(320, 332))
    text = "déjà vu 一张 🙂\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_seed_decides_the_weights(tmp_path):
    def embedding(name, seed):
        folder = make_checkpoint(tmp_path / name, "qwen2", "chat", seed=seed)
        checkpoint = open_checkpoint(str(folder))
        ((_, tensor),) = checkpoint.load(["language_model.model.embed_tokens.weight"])
        return tensor

    first = embedding("a", 1)
    assert torch.equal(first, embedding("b", 1)) and not torch.equal(first, embedding("c", 2))
