"""Ids and bytes of fast tokenizers against the library's own classes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from llm_service.tokenizer import load_tokenizer
from tests.llm_service.vocabularies import TEXTS, sentencepiece_like, train_byte_level, whole_string_ids


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_ids_equal_the_library(byte_level: Path, text: str) -> None:
    tokenizer = load_tokenizer(byte_level)
    library = PreTrainedTokenizerFast.from_pretrained(byte_level)
    assert whole_string_ids(tokenizer, text) == library(text)["input_ids"]


@pytest.mark.parametrize("prepend_scheme", ["first", "always", "never"])
def test_sentencepiece_like_fast_ids_equal_the_library(tmp_path: Path, prepend_scheme: str) -> None:
    library = sentencepiece_like(prepend_scheme)
    library.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_ids == [1]
    for text in ("the other", "the<|end|>the", "<|end|>\n the", " the 猫<|end|>  x", "a</s>the</s>"):
        ids = library(text)["input_ids"]
        assert whole_string_ids(tokenizer, text) == ids, text
        assert tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=True)


def test_vocab_and_merges_without_tokenizer_json_are_read(byte_level: Path, tmp_path: Path) -> None:
    train_byte_level().model.save(str(tmp_path))
    library = PreTrainedTokenizerFast.from_pretrained(byte_level)
    decoder = {
        str(token_id): {"content": token.content, "special": token.special}
        for token_id, token in library.added_tokens_decoder.items()
    }
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": decoder,
        "eos_token": "<|im_end|>",
        "add_bos_token": False,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    reference = Qwen2Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.token_id("<IMG_CONTEXT>") == library.convert_tokens_to_ids("<IMG_CONTEXT>")
    for text in TEXTS:
        assert whole_string_ids(tokenizer, text) == reference(text)["input_ids"], text


def test_byte_level_decoding_equals_the_library_on_any_ids(byte_level: Path) -> None:
    tokenizer = load_tokenizer(byte_level)
    library = PreTrainedTokenizerFast.from_pretrained(byte_level)
    rng = random.Random(1)
    for skip in (True, False):
        for _ in range(300):
            ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randint(0, 20))]
            expected = library.decode(ids, skip_special_tokens=skip)
            assert tokenizer.decode(ids, skip_special_tokens=skip) == expected


def test_added_tokens_that_are_not_special_are_recognised_in_plain_text(byte_level: Path) -> None:
    tokenizer = load_tokenizer(byte_level)
    assert tokenizer.token_id("<think>") in tokenizer.encode_plain("a <think> b")
    assert "<think>" not in tokenizer.special_tokens
