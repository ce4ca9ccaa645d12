"""Texts to be read: within their limit, readable in one way only, and seldom guessable."""

import random
import re
import string

import pytest

from deploy.demo_training.words import (
    SAME_IN_BOTH_CASES,
    WORDS,
    invented_word,
    price,
    text_to_read,
    words_only,
)


def many(max_chars: int, count: int = 2000) -> list[str]:
    rng = random.Random(max_chars)
    return [text_to_read(rng, max_chars) for _ in range(count)]


@pytest.mark.parametrize("max_chars", range(1, 15))
def test_a_text_has_one_to_max_chars_characters(max_chars: int) -> None:
    for text in many(max_chars, 300):
        assert 1 <= len(text) <= max_chars
        assert text == text.strip() and "  " not in text


def test_shop_names_keep_to_the_limit() -> None:
    rng = random.Random(0)
    assert all(2 <= len(words_only(rng, 12)) <= 12 for _ in range(500))


def test_listed_words_are_distinct_lower_case_and_two_to_ten_letters() -> None:
    assert len(set(WORDS)) == len(WORDS) >= 500
    assert all(re.fullmatch("[a-z]{2,10}", word) for word in WORDS)


def test_at_least_half_of_the_texts_are_not_listed_words() -> None:
    texts = many(10)
    assert sum(text.lower() in WORDS for text in texts) <= len(texts) / 2


def test_every_letter_digit_and_mark_of_signs_occurs() -> None:
    seen = set("".join(many(12, 20000)))
    assert set(string.ascii_letters + string.digits + ".,-:!?$%&/'#+") <= seen


def test_plates_leave_out_letters_and_digits_that_look_alike() -> None:
    for text in many(8, 5000):
        if re.search("[A-Z]", text) and re.search("[0-9]", text) and not re.search("No|AM|PM", text):
            assert not set(text) & set("IOl01"), text


def test_no_capital_i_stands_before_small_letters() -> None:
    assert not [text for text in many(10, 5000) if re.search(r"\bI[a-z]", text)]


def test_no_text_hangs_on_the_size_of_its_letters_alone() -> None:
    for text in many(3, 5000):
        assert not SAME_IN_BOTH_CASES.issuperset(text), text


def test_invented_words_have_a_vowel() -> None:
    rng = random.Random(0)
    for _ in range(1000):
        assert set(invented_word(rng, 7)) & set("aeiou")


def test_prices_have_two_decimals_and_the_sign_asked_for() -> None:
    rng = random.Random(0)
    assert all(re.fullmatch(r"\$[1-9]\d?\.\d\d", price(rng, "$")) for _ in range(200))


def test_the_same_state_gives_the_same_texts() -> None:
    assert many(9, 50) == many(9, 50)
