"""Words stay as they are while the sentence around them takes what form users give it."""

from __future__ import annotations

import random

import pytest

from deploy.demo_training.phrasing import join_list, phrase, plural, with_article


def test_the_words_put_in_keep_their_letters() -> None:
    questions = {
        phrase(random.Random(seed), ("Which image says {text}?",), text="OPEN") for seed in range(200)
    }
    assert questions == {
        "Which image says OPEN?",
        "Which image says OPEN",
        "which image says OPEN?",
        "which image says OPEN",
    }


@pytest.mark.parametrize(
    ("words", "expected"),
    [("orange star", "an orange star"), ("red circle", "a red circle"), ("hexagon", "a hexagon")],
)
def test_a_stands_before_consonants_and_an_before_vowels(words: str, expected: str) -> None:
    assert with_article(words) == expected


def test_plurals_and_lists_are_english() -> None:
    assert (plural("cross"), plural("star")) == ("crosses", "stars")
    assert join_list(["a"]) == "a"
    assert join_list(["a", "b"]) == "a and b"
    assert join_list(["a", "b", "c"]) == "a, b and c"
