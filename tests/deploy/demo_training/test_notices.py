"""A notice's marks spell its text, inside the picture and large enough for a single tile."""

from __future__ import annotations

import random

import pytest

from deploy.demo_training.fonts import FontShelf
from deploy.demo_training.notices import LONGEST_TEXT, make_notice


@pytest.mark.parametrize("size", [(224, 224), (180, 220), (500, 250)])
def test_the_marks_spell_the_text_within_the_picture(fonts: FontShelf, size: tuple[int, int]) -> None:
    for seed in range(60):
        text, picture = make_notice(random.Random(seed), size, fonts, seed % 3 / 2)
        assert 1 <= len(text) <= LONGEST_TEXT
        assert "".join(mark.label for mark in picture.marks) == text.replace(" ", "")
        assert all(0 < mark.x < 1 and 0 < mark.y < 1 for mark in picture.marks), (seed, text)
        assert picture.image.size == size
        ordered = [mark.x for mark in picture.marks]
        assert ordered == sorted(ordered)


def test_characters_keep_a_readable_distance_on_the_single_tile(fonts: FontShelf) -> None:
    for seed in range(100):
        text, picture = make_notice(random.Random(seed), (224, 224), fonts, 1.0)
        if len(text) > 2:
            pitch = (picture.marks[-1].x - picture.marks[0].x) * 224 / (len(text) - 1)
            assert pitch > 5, text


def test_the_same_state_gives_the_same_picture(fonts: FontShelf) -> None:
    (text, one), (same, other) = (make_notice(random.Random(9), (200, 200), fonts, 1.0) for _ in range(2))
    assert text == same and one.image.tobytes() == other.image.tobytes() and one.marks == other.marks
