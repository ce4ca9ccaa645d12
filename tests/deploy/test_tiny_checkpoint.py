"""The embedded checkpoint is one that the services' own loaders and transformers accept."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from deploy.random_checkpoint import SPECIAL_TOKENS, write_random_checkpoint
from deploy.tiny_checkpoint import TINY, default_checkpoint
from protos.checkpoint import Checkpoint, CheckpointFormat, open_checkpoint
from protos.preprocessing import Preprocessing


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(str(write_random_checkpoint(tmp_path_factory.mktemp("tiny"), TINY)))


def test_it_opens_as_a_chat_checkpoint_of_two_shards(checkpoint: Checkpoint) -> None:
    assert checkpoint.format is CheckpointFormat.CHAT
    assert len({entry.file for entry in checkpoint.tensors.values()}) == 2
    assert len(checkpoint.vision_names()) + len(checkpoint.language_names()) == len(checkpoint.tensors)


def test_its_preprocessing_is_dynamic_with_64_tokens_a_tile(checkpoint: Checkpoint) -> None:
    preprocessing = Preprocessing.from_checkpoint(checkpoint)
    assert preprocessing.tokens_per_tile == 64
    assert (preprocessing.min_tiles, preprocessing.max_tiles, preprocessing.use_thumbnail) == (1, 12, True)


def test_weights_are_finite_and_the_same_every_time(checkpoint: Checkpoint, tmp_path: Path) -> None:
    again = open_checkpoint(str(write_random_checkpoint(tmp_path, TINY)))
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
    assert len(set(ids)) == len(SPECIAL_TOKENS) and max(ids) < TINY.vocab_size
    assert tokenizer("<img><IMG_CONTEXT></img>").input_ids == ids[3:4] + ids[5:6] + ids[4:5]


def test_only_words_and_punctuation_can_win(checkpoint: Checkpoint) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    ((_, head),) = checkpoint.load(["language_model.lm_head.weight"])
    speakable = [tokenizer.decode([number]) for number in head.any(dim=1).nonzero().flatten().tolist()]
    assert len(speakable) > 50
    assert all(text in ".,?" or text[0] == " " and text[1:].isalpha() for text in speakable)


def test_the_default_is_made_once_even_when_many_ask(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(default_checkpoint(cache))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 1 and list(cache.iterdir()) == [folders[0]]
    before = (folders[0] / "config.json").stat().st_mtime_ns
    assert (default_checkpoint(cache) / "config.json").stat().st_mtime_ns == before
