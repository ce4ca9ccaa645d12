"""A checkpoint follows its shape in every file, and the services' own loaders and transformers accept it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from deploy.random_checkpoint import SPECIAL_TOKENS, TOKENIZER_SIZE, CheckpointShape, write_random_checkpoint
from protos.checkpoint import Checkpoint, CheckpointFormat, open_checkpoint
from protos.preprocessing import Preprocessing

# No two sizes alike, so that none can stand for another.
SHAPE = CheckpointShape(
    image_size=56,
    vision_hidden=24,
    vision_intermediate=40,
    vision_layers=3,
    vision_heads=2,
    hidden=48,
    intermediate=80,
    layers=1,
    heads=6,
    kv_heads=2,
    head_dim=16,
    vocab_size=TOKENIZER_SIZE + 32,
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("parent") / "made" / "here"
    assert write_random_checkpoint(folder, SHAPE) == folder
    return open_checkpoint(str(folder))


def test_it_opens_as_a_chat_checkpoint_of_two_shards(checkpoint: Checkpoint) -> None:
    assert checkpoint.format is CheckpointFormat.CHAT
    assert len({entry.file for entry in checkpoint.tensors.values()}) == 2
    assert len(checkpoint.vision_names()) + len(checkpoint.language_names()) == len(checkpoint.tensors)


def test_its_preprocessing_is_dynamic_with_the_tokens_of_its_tile(checkpoint: Checkpoint) -> None:
    preprocessing = Preprocessing.from_checkpoint(checkpoint)
    assert preprocessing.tokens_per_tile == 4
    assert (preprocessing.min_tiles, preprocessing.max_tiles, preprocessing.use_thumbnail) == (1, 12, True)


def test_weights_are_finite_and_the_same_every_time(checkpoint: Checkpoint, tmp_path: Path) -> None:
    again = open_checkpoint(str(write_random_checkpoint(tmp_path, SHAPE)))
    names = sorted(checkpoint.tensors)
    pairs = zip(checkpoint.load(names), again.load(names), strict=True)
    for (name, first), (_, second) in pairs:
        assert first.dtype is torch.bfloat16
        assert first.isfinite().all() and torch.equal(first, second), name


def test_transformers_reads_its_tokenizer_and_round_trips_any_text(checkpoint: Checkpoint) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    text = "What does the café sell? 咖啡 🐈\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert len(set(ids)) == len(SPECIAL_TOKENS) and max(ids) < SHAPE.vocab_size
    assert tokenizer("<img><IMG_CONTEXT></img>").input_ids == ids[3:4] + ids[5:6] + ids[4:5]


def test_only_words_and_punctuation_can_win(checkpoint: Checkpoint) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    ((_, head),) = checkpoint.load(["language_model.lm_head.weight"])
    speakable = [tokenizer.decode([number]) for number in head.any(dim=1).nonzero().flatten().tolist()]
    assert len(speakable) > 50
    assert all(text in ".,?" or text[0] == " " and text[1:].isalpha() for text in speakable)


def read(checkpoint: Checkpoint, name: str) -> Any:
    return json.loads((checkpoint.folder / name).read_text(encoding="utf-8"))


def num_bytes(path: Path) -> int:
    """Of the tensors in a safetensors file: what is behind its header."""
    data = path.read_bytes()
    return len(data) - 8 - int.from_bytes(data[:8], "little")


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("vision_model.embeddings.position_embedding", (1, 17, 24)),
        ("vision_model.encoder.layers.2.attn.qkv.weight", (72, 24)),
        ("vision_model.encoder.layers.2.mlp.fc1.weight", (40, 24)),
        ("mlp1.1.weight", (48, 96)),
        ("language_model.model.layers.0.self_attn.q_proj.weight", (96, 48)),
        ("language_model.model.layers.0.self_attn.k_proj.weight", (32, 48)),
        ("language_model.model.layers.0.self_attn.o_proj.weight", (48, 96)),
        ("language_model.model.layers.0.mlp.down_proj.weight", (48, 80)),
        ("language_model.lm_head.weight", (800, 48)),
    ],
)
def test_weights_have_the_sizes_of_the_shape(
    checkpoint: Checkpoint, name: str, sizes: tuple[int, ...]
) -> None:
    assert tuple(checkpoint.tensors[name].shape) == sizes


def test_layers_are_as_many_as_the_shape_says(checkpoint: Checkpoint) -> None:
    names = list(checkpoint.tensors)
    assert sum(name.endswith("attn.qkv.weight") for name in names) == SHAPE.vision_layers
    assert sum(name.endswith("q_proj.weight") for name in names) == SHAPE.layers


def test_the_config_says_what_the_weights_are(checkpoint: Checkpoint) -> None:
    config = read(checkpoint, "config.json")
    vision, language = config["vision_config"], config["llm_config"]
    assert (vision["hidden_size"], vision["num_hidden_layers"], vision["image_size"]) == (24, 3, 56)
    assert (language["num_attention_heads"], language["num_key_value_heads"]) == (6, 2)
    assert (language["head_dim"], language["vocab_size"]) == (16, 800)
    assert read(checkpoint, "preprocessor_config.json")["size"] == config["force_image_size"] == 56


def test_the_index_names_every_tensor_and_their_bytes(checkpoint: Checkpoint) -> None:
    index = read(checkpoint, "model.safetensors.index.json")
    assert set(index["weight_map"]) == set(checkpoint.tensors)
    files = set(index["weight_map"].values())
    assert files == {path.name for path in checkpoint.folder.glob("*.safetensors")}
    padded = sum(num_bytes(checkpoint.folder / file) for file in files)
    assert index["metadata"]["total_size"] == padded


def test_special_tokens_and_rows_beyond_the_tokenizer_never_win(checkpoint: Checkpoint) -> None:
    ((_, head),) = checkpoint.load(["language_model.lm_head.weight"])
    num_words = len(AutoTokenizer.from_pretrained(checkpoint.folder)) - len(SPECIAL_TOKENS)
    assert head.shape[0] == SHAPE.vocab_size > num_words
    assert head[:num_words].any() and not head[num_words:].any()


def test_all_files_agree_on_the_token_that_ends_an_answer(checkpoint: Checkpoint) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert len(tokenizer) <= TOKENIZER_SIZE
    assert tokenizer.eos_token_id == end == read(checkpoint, "generation_config.json")["eos_token_id"]
    assert read(checkpoint, "config.json")["llm_config"]["eos_token_id"] == end


def test_the_chat_template_is_that_of_the_family(checkpoint: Checkpoint) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    chat = [{"role": "user", "content": "What?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"


def test_a_deeper_language_model_leaves_the_vision_tower_as_it_was(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    deeper = open_checkpoint(str(write_random_checkpoint(tmp_path, replace(SHAPE, layers=2))))
    names = sorted(checkpoint.vision_names())
    assert sorted(deeper.vision_names()) == names
    for (name, first), (_, second) in zip(checkpoint.load(names), deeper.load(names), strict=True):
        assert torch.equal(first, second), name
