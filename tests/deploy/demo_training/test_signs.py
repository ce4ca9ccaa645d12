"""Signs: the answers are what is written, inside the picture, large enough and reproducible."""

import random
from collections.abc import Iterator

import pytest

from deploy.demo_training.fonts import FontShelf
from deploy.demo_training.sample import COLORS, MARK_LABELS, Sample
from deploy.demo_training.signs import make_sign

SIZES = ((256, 256), (224, 300), (672, 448), (448, 672))


def samples(fonts: FontShelf, level: float, count: int = 40) -> Iterator[tuple[Sample, tuple[int, int]]]:
    rng = random.Random(7)
    for size in SIZES:
        for _ in range(count):
            yield make_sign(rng, size, fonts, level), size


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_a_sign_is_one_picture_of_the_size_asked_for_with_one_or_two_questions(
    fonts: FontShelf, level: float
) -> None:
    for sample, size in samples(fonts, level):
        (picture,) = sample.pictures
        assert picture.image.size == size and picture.image.mode == "RGB"
        assert 1 <= len(sample.turns) <= 2
        assert {turn.task for turn in sample.turns} <= {"read", "color", "describe", "price"}


def test_the_same_state_gives_the_same_bytes(fonts: FontShelf) -> None:
    for seed in range(25):
        one, other = (make_sign(random.Random(seed), (300, 280), fonts, 1.0) for _ in range(2))
        assert one.pictures[0].image.tobytes() == other.pictures[0].image.tobytes()
        assert one.turns == other.turns and one.pictures[0].marks == other.pictures[0].marks


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_what_is_to_be_read_is_written_in_the_picture(fonts: FontShelf, level: float) -> None:
    for sample, _ in samples(fonts, level):
        written = "".join(mark.label for mark in sample.pictures[0].marks)
        for turn in sample.turns:
            if turn.task in ("read", "price"):
                assert turn.answer.replace(" ", "") in written, turn


def test_all_marks_lie_in_the_picture_and_have_known_labels(fonts: FontShelf) -> None:
    for sample, _ in samples(fonts, 1.0):
        for mark in sample.pictures[0].marks:
            assert mark.label in MARK_LABELS
            assert 0 < mark.x < 1 and 0 < mark.y < 1, mark


def test_easy_signs_have_three_characters_at_most(fonts: FontShelf) -> None:
    for sample, _ in samples(fonts, 0.0):
        assert 1 <= len(sample.pictures[0].marks) <= 3


def test_neighbouring_characters_of_a_single_tile_are_seven_pixels_apart_on_average(fonts: FontShelf) -> None:
    rng = random.Random(5)
    for _ in range(150):
        sample = make_sign(rng, (300, 300), fonts, 0.4)  # below the level of shop fronts and price boards
        reads = [turn for turn in sample.turns if turn.task == "read" and " " not in turn.answer]
        marks = sample.pictures[0].marks
        if reads and len(reads[0].answer) == len(marks) >= 4:
            pitch = (marks[-1].x - marks[0].x) * 224 / (len(marks) - 1)
            assert pitch >= 7 * 0.85, sample.turns


def test_colours_are_named_with_the_words_of_the_shapes(fonts: FontShelf) -> None:
    answers = [
        turn.answer for sample, _ in samples(fonts, 0.6, 100) for turn in sample.turns if turn.task == "color"
    ]
    assert len(answers) > 20 and set(answers) <= set(COLORS)


def test_descriptions_quote_what_is_read(fonts: FontShelf) -> None:
    described = 0
    for sample, _ in samples(fonts, 0.4, 100):
        answers = {turn.task: turn.answer for turn in sample.turns}
        if {"read", "describe"} <= set(answers):
            assert answers["read"] in answers["describe"]
            assert answers["describe"].startswith('a sign that says "')
            described += 1
    assert described > 5


def test_shop_fronts_and_prices_come_with_the_level(fonts: FontShelf) -> None:
    tasks = [turn.task for sample, _ in samples(fonts, 1.0, 60) for turn in sample.turns]
    assert tasks.count("price") >= 5
    assert not [turn for sample, _ in samples(fonts, 0.3) for turn in sample.turns if turn.task == "price"]
