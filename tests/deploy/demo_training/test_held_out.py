"""Held-out questions: as many as the table says, the same each time, and never those of training."""

from __future__ import annotations

import io
import random
from collections import Counter, defaultdict
from functools import cache

import pytest
from PIL import Image, ImageChops

from deploy.demo_training.clips import AT_REST, DIRECTIONS
from deploy.demo_training.fonts import (
    EMBEDDED,
    HELD_OUT_FAMILIES,
    TRAINING_FAMILIES,
    FontFace,
    FontShelf,
)
from deploy.demo_training.held_out import NAMESPACE, NUM_QUESTIONS, ROWS, Question, held_out_questions
from deploy.demo_training.sample import CHARACTERS, COLORS, SHAPES
from encoder_service.tiling import TilingOptions, plan_tiles

SHELF = FontShelf([FontFace(EMBEDDED, EMBEDDED, None)])
PLACES = {"left", "right", "above", "below", "top", "bottom", "center"}


@cache
def questions() -> tuple[Question, ...]:
    return tuple(held_out_questions(SHELF, seed=3, number=120))


def of_row(name: str) -> list[Question]:
    found = [question for question in questions() if question.row == name]
    assert found
    return found


def decoded(question: Question) -> list[Image.Image]:
    images = [Image.open(io.BytesIO(picture.data)) for picture in question.pictures]
    for image in images:
        image.load()
    return images


def test_the_rows_add_up_to_all_questions() -> None:
    assert sum(row.number for row in ROWS) == NUM_QUESTIONS
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_rows_are_scaled_alike_and_none_is_left_out() -> None:
    counts = Counter(question.row for question in questions())
    assert counts == {row.name: max(1, round(row.number * 0.24)) for row in ROWS}
    few = held_out_questions(SHELF, seed=3, number=1)
    assert [question.row for question in few] == [row.name for row in ROWS]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others() -> None:
    once, again, other = (held_out_questions(SHELF, seed, 12) for seed in (5, 5, 6))
    assert once == again
    assert not set(once) & set(other)


def test_fewer_questions_are_the_first_of_more() -> None:
    few = held_out_questions(SHELF, seed=3, number=12)
    for row in ROWS:
        first = [question for question in few if question.row == row.name]
        assert of_row(row.name)[: len(first)] == first


def test_no_worker_of_the_training_can_have_the_seed() -> None:
    # Its seeds are "NUMBER/NUMBER"; equal texts alone give equal streams.
    assert not NAMESPACE[0].isdigit()
    training = {random.Random(f"{seed}/{worker}").random() for seed in range(20) for worker in range(32)}
    held_out = {
        random.Random(f"{NAMESPACE}/{seed}/{row.name}").random() for seed in range(20) for row in ROWS
    }
    assert not training & held_out


def test_no_held_out_font_is_trained_on() -> None:
    def starts(families: dict[str, tuple[str, ...]]) -> list[str]:
        return [start for names in families.values() for start in names]

    for tested in starts(HELD_OUT_FAMILIES):
        for trained in starts(TRAINING_FAMILIES):
            assert not tested.startswith(trained) and not trained.startswith(tested), (tested, trained)
    shelf = FontShelf.find("held_out")
    assert not set(shelf.families) & set(TRAINING_FAMILIES) and EMBEDDED in shelf.families


def test_pictures_are_files_of_the_format_they_say_half_of_them_each() -> None:
    formats: Counter[str] = Counter()
    for question in questions():
        for image, picture in zip(decoded(question), question.pictures, strict=True):
            assert (image.format or "").lower() == picture.format and image.mode == "RGB"
        formats.update({picture.format for picture in question.pictures})
    assert 0.4 < formats["jpeg"] / formats.total() < 0.6


def test_single_pictures_come_in_every_number_of_tiles_that_training_had() -> None:
    options = TilingOptions(1, 6, True)
    counts = Counter()
    for question in questions():
        if len(question.pictures) == 1:
            (image,) = decoded(question)
            assert question.max_tiles is None and max(image.size) <= 960
            counts[plan_tiles(*image.size, options, 224).num_tiles] += 1
    assert set(counts) >= {1, 3, 4, 5, 7}


def test_only_talk_is_without_pictures_and_only_a_second_turn_has_two_texts() -> None:
    for question in questions():
        assert bool(question.pictures) == (question.row != "talk")
        assert len(question.texts) == (2 if question.row == "second turn" else 1)


@pytest.mark.parametrize(("row", "fewest", "most"), [("multi-image", 2, 4), ("motion", 4, 8)])
def test_several_pictures_have_labels_or_none_and_a_bound_on_their_tiles(
    row: str, fewest: int, most: int
) -> None:
    for question in of_row(row):
        assert fewest <= len(question.pictures) <= most
        assert len(question.labels) in (0, len(question.pictures))
        assert question.max_tiles == 1 or (row == "multi-image" and len(question.pictures) == 2)


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        ("color", set(COLORS)),
        ("shape", set(SHAPES)),
        ("count", set("012345678")),
        ("yes/no", {"yes", "no"}),
        ("motion", {*DIRECTIONS, AT_REST}),
    ],
)
def test_answers_are_of_the_few_that_the_row_has(row: str, answers: set[str]) -> None:
    found = {question.answer for question in of_row(row)}
    assert found <= answers and len(found) > 1


def test_places_are_parts_of_the_picture_sides_or_objects() -> None:
    for question in of_row("place"):
        article, _, name = question.answer.partition(" ")
        if article in ("a", "an"):
            color, shape = name.split()
            assert color in COLORS and shape in SHAPES
        else:
            assert set(question.answer.split()) <= PLACES


def test_readings_are_split_by_their_length_and_have_no_other_spaces_than_single_ones() -> None:
    for row in ("reading (up to 8 characters)", "reading (longer, several lines)"):
        for question in of_row(row):
            assert (len(question.answer) <= 8) == ("up to 8" in row)
            assert question.answer == " ".join(question.answer.split())
            assert set(question.answer) <= {*CHARACTERS, " "}


def test_an_image_that_is_the_answer_is_there() -> None:
    named = [question for question in of_row("multi-image") if question.answer.startswith("Image-")]
    assert named
    for question in named:
        assert 1 <= int(question.answer.removeprefix("Image-")) <= len(question.pictures)


def test_the_same_question_about_the_same_pictures_has_one_answer() -> None:
    answers: defaultdict[tuple[object, ...], set[str]] = defaultdict(set)
    for question in questions():
        answers[question.pictures, question.texts[-1].lower()].add(question.answer)
    assert {len(found) for found in answers.values()} == {1}
    assert len(set(questions())) == len(questions())


def centre_of_change(first: Image.Image, second: Image.Image) -> tuple[float, float]:
    """Of what differs by at least half of the most, in shares of the picture."""
    small = [image.convert("RGB").resize((40, 40), Image.Resampling.BOX) for image in (first, second)]
    changed = max(ImageChops.difference(*small).split(), key=lambda band: band.getextrema()[1])
    values = changed.tobytes()
    spots = [divmod(at, 40) for at, value in enumerate(values) if value * 2 >= max(values)]
    return sum(x for _, x in spots) / len(spots) / 40, sum(y for y, _ in spots) / len(spots) / 40


def test_what_moves_in_the_frames_moves_the_way_that_is_the_answer() -> None:
    moving = [question for question in of_row("motion") if question.answer != AT_REST]
    assert len(moving) >= 8
    for question in moving:
        frames = decoded(question)
        (x0, y0), (x1, y1) = centre_of_change(*frames[:2]), centre_of_change(*frames[-2:])
        right, down = (x1 - x0) * frames[0].width, (y1 - y0) * frames[0].height
        if abs(right) > abs(down):
            assert question.answer == ("right" if right > 0 else "left"), question.texts
        else:
            assert question.answer == ("down" if down > 0 else "up"), question.texts
