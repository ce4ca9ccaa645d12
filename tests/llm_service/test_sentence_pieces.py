"""Ids and bytes of a bare tokenizer.model against the slow classes' algorithm."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from llm_service.tokenizer import load_tokenizer
from protos.checkpoint import CheckpointError
from tests.llm_service.vocabularies import TEXTS, RemoteSlowTokenizer, whole_string_ids, write_sentencepiece


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_ids_equal_the_remote_slow_class(internlm2: Path, text: str) -> None:
    tokenizer, remote = load_tokenizer(internlm2), RemoteSlowTokenizer(internlm2)
    ids = whole_string_ids(tokenizer, text)
    assert ids == remote(text)
    assert tokenizer.decode(ids) == remote.decode(ids)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("rstrip", [True, False])
def test_slow_llama_ids_equal_both_behaviours(tmp_path: Path, legacy: bool, rstrip: bool) -> None:
    folder = write_sentencepiece(tmp_path, True, tokenizer_class="LlamaTokenizer", legacy=legacy)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for token in config["added_tokens_decoder"].values():
        token["rstrip"] = rstrip
    path.write_text(json.dumps(config))
    tokenizer, remote = load_tokenizer(folder), RemoteSlowTokenizer(folder)
    for text in TEXTS:
        assert whole_string_ids(tokenizer, text) == remote(text), text


def test_random_texts_equal_the_remote_slow_class(internlm2: Path) -> None:
    tokenizer, remote = load_tokenizer(internlm2), RemoteSlowTokenizer(internlm2)
    rng = random.Random(0)
    words = [
        "the",
        " ",
        "  ",
        "\n",
        "▁",
        "猫",
        "👍",
        "<img>",
        "<|im_end|>",
        "dogs",
        "e\u0301",
        "\x00",
        "<0x41>",
    ]
    for _ in range(300):
        text = "".join(rng.choices(words, k=rng.randint(0, 12)))
        assert whole_string_ids(tokenizer, text) == remote(text), text


def test_an_unused_piece_that_became_a_special_token_is_spelled_out(internlm2: Path) -> None:
    tokenizer = load_tokenizer(internlm2)
    text = "stop [UNUSED_TOKEN_145] here"
    ids = tokenizer.encode_plain(text)
    assert tokenizer.token_id("<|im_end|>") not in ids
    assert tokenizer.decode(ids) == text


def test_old_folders_give_added_tokens_by_added_tokens_json(internlm2: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((internlm2 / "tokenizer.model").read_bytes())
    config = json.loads((internlm2 / "tokenizer_config.json").read_text())
    decoder = config.pop("added_tokens_decoder")
    contents = {token["content"]: int(token_id) for token_id, token in decoder.items()}
    base = ("<s>", "</s>", "<unk>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    added = {content: i for content, i in contents.items() if content not in base}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"additional_special_tokens": [content for content in added if content != "<quad>"]})
    )
    tokenizer = load_tokenizer(tmp_path)
    assert dict(tokenizer.special_tokens) == {c: i for c, i in contents.items() if c != "<quad>"}
    assert tokenizer.bos_ids == [1] and tokenizer.eos_token_id == 2
    text = "<|im_start|>user\nhi<|im_end|>"
    assert whole_string_ids(tokenizer, text) == RemoteSlowTokenizer(internlm2)(text)


def test_a_special_token_without_an_id_is_named(tmp_path: Path) -> None:
    folder = write_sentencepiece(tmp_path, True, additional_special_tokens=["<nowhere>"])
    with pytest.raises(CheckpointError, match="<nowhere>"):
        load_tokenizer(folder)
