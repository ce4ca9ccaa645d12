"""The tokenizer keeps what is read as characters and everything as it was written."""

from __future__ import annotations

import pytest

from deploy.demo_training.vocabulary import make_tokenizer
from deploy.random_checkpoint import SPECIAL_TOKENS

WORDS = ("the", "there", "sign", "circle")


@pytest.mark.parametrize(
    "text", ["What is there? the circles", "OPEN DAILY 9:30", "café \U0001f600\n\t x", " theatre"]
)
def test_text_survives(text: str) -> None:
    tokenizer = make_tokenizer(WORDS)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_word_behind_a_space_is_one_token_and_at_the_start_it_is_characters() -> None:
    tokenizer = make_tokenizer(WORDS)
    assert tokenizer.encode("sign sign").tokens == ["s", "i", "g", "n", "\u0120sign"]


def test_the_order_of_words_does_not_matter() -> None:
    assert make_tokenizer(WORDS).to_str() == make_tokenizer(reversed(WORDS)).to_str()


def test_special_tokens_are_the_last_ids_and_whole() -> None:
    tokenizer = make_tokenizer(WORDS)
    ids = [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS]
    assert ids == list(range(tokenizer.get_vocab_size() - len(ids), tokenizer.get_vocab_size()))
    assert tokenizer.encode("<img></img>").ids == [
        tokenizer.token_to_id("<img>"),
        tokenizer.token_to_id("</img>"),
    ]
