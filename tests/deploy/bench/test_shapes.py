"""Both services read the folder as the real model's, and prompts have the lengths that the peers' had."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import pytest

from deploy.bench.report import read_peers
from deploy.bench.shapes import INTERNVL2_26B, SPECIAL_TOKENS, TOKENS_PER_TILE, write_shape
from deploy.bench.workload import WORKLOADS, request_bodies
from encoder_service.model.config import VisionConfig
from encoder_service.tiling import TilingOptions, plan_tiles
from llm_service.model.config import DecoderConfig
from llm_service.prompt import ImagePart, Message, PromptBuilder, TextPart
from llm_service.tokenizer import load_tokenizer
from protos.checkpoint import Checkpoint, open_checkpoint
from protos.preprocessing import Preprocessing


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(str(write_shape(tmp_path_factory.mktemp("shape") / "made")))


def test_it_is_the_shape_of_internvl3_8b_without_weights(checkpoint: Checkpoint) -> None:
    assert not checkpoint.tensors
    decoder, tower = DecoderConfig.from_checkpoint(checkpoint), VisionConfig.from_checkpoint(checkpoint)
    assert (decoder.num_layers, decoder.hidden_size, decoder.intermediate_size) == (28, 3584, 18944)
    assert (decoder.num_heads, decoder.num_kv_heads, decoder.head_dim) == (28, 4, 128)
    assert (decoder.vocab_size, decoder.qkv_bias, decoder.qk_norm) == (151674, True, False)
    assert (tower.num_layers, tower.hidden_size, tower.num_heads) == (24, 1024, 16)
    assert (tower.intermediate_size, tower.output_size, tower.qkv_bias) == (4096, 3584, True)
    assert Preprocessing.from_checkpoint(checkpoint).tokens_per_tile == TOKENS_PER_TILE


def test_it_is_the_shape_of_internvit_6b_and_a_decoder_of_20b(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_shape(tmp_path / "made", INTERNVL2_26B)))
    decoder, tower = DecoderConfig.from_checkpoint(checkpoint), VisionConfig.from_checkpoint(checkpoint)
    assert (decoder.num_layers, decoder.hidden_size, decoder.intermediate_size) == (48, 6144, 16384)
    assert (decoder.num_heads, decoder.num_kv_heads, decoder.head_dim) == (48, 8, 128)
    assert (tower.num_layers, tower.hidden_size, tower.num_heads) == (45, 3200, 25)
    assert (tower.intermediate_size, tower.output_size, tower.qkv_bias) == (12800, 6144, False)


def test_special_tokens_have_their_real_ids_and_a_character_is_a_token(checkpoint: Checkpoint) -> None:
    tokenizer = load_tokenizer(checkpoint.folder)
    assert tokenizer.vocab_size == 151674 and len(tokenizer.special_tokens) == len(SPECIAL_TOKENS)
    assert tokenizer.token_id("<|im_end|>") == 151645 and tokenizer.token_id("<IMG_CONTEXT>") == 151667
    text = "red panda, ein Bär"
    assert len(tokenizer.encode_plain(text)) == len(text.encode())
    assert tokenizer.decode([151642, *tokenizer.encode_plain(text)]) == f"t151642{text}"


@pytest.mark.parametrize("name", WORKLOADS)
def test_prompts_are_as_long_as_the_peers(checkpoint: Checkpoint, name: str) -> None:
    workload, preprocessing = WORKLOADS[name], Preprocessing.from_checkpoint(checkpoint)
    builder = PromptBuilder.from_checkpoint(checkpoint, load_tokenizer(checkpoint.folder))
    options = TilingOptions(preprocessing.min_tiles, preprocessing.max_tiles, preprocessing.use_thumbnail)
    size = (workload.width or 1, workload.height or 1)
    visual_tokens = plan_tiles(*size, options, preprocessing.image_size).num_tiles * TOKENS_PER_TILE
    lengths = []
    for body in request_bodies(workload, "m", 1, 24):
        text = json.loads(body)["messages"][0]["content"][-1]["text"]
        parts = (*(ImagePart(index) for index in range(workload.num_images)), TextPart(text))
        prompt = builder.build([Message("user", parts)], [visual_tokens] * workload.num_images)
        lengths.append(len(prompt.token_ids))
    expected = read_peers()["prompt_tokens"][name]
    assert mean(lengths) == pytest.approx(expected, abs=6)
    assert workload.prompt_tokens == expected
