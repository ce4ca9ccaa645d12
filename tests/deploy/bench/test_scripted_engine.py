"""The letters that tell the time."""

from __future__ import annotations

from pathlib import Path

from deploy.bench.letters import LETTERS
from deploy.bench.scripted_engine import letter_ids
from llm_service.tokenizer import load_tokenizer


def test_each_letter_is_one_token(checkpoint: Path) -> None:
    tokenizer = load_tokenizer(checkpoint)
    ids = letter_ids(tokenizer)
    assert tokenizer.decode(ids) == LETTERS and len(set(ids)) == len(LETTERS)
