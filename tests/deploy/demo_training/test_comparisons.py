"""Answers about several pictures, checked against the marks of each."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from deploy.demo_training.comparisons import make_comparison
from deploy.demo_training.fonts import FontShelf
from deploy.demo_training.sample import COLORS, SHAPES, Picture, Sample, Turn

COLOR, SHAPE = "|".join(COLORS), "|".join(SHAPES)
NAMED_IMAGE = re.compile(r"image[- ](\d)|the (first|second|third|fourth|last) (?:image|picture)")
ORDINALS = ["first", "second", "third", "fourth"]


@pytest.fixture(scope="module")
def samples(fonts: FontShelf) -> list[Sample]:
    return [
        make_comparison(
            random.Random(seed), [(128, 128), (120, 140), (130, 110), (128, 100)][: 2 + seed % 3], fonts, 0.7
        )
        for seed in range(900)
    ]


def _is_text(picture: Picture) -> bool:
    return all(len(mark.label) == 1 for mark in picture.marks)


def _text(picture: Picture) -> str:
    return "".join(mark.label for mark in picture.marks)


def _matching(picture: Picture, color: str | None, shape: str | None) -> list[str]:
    pairs = [mark.label.split() for mark in picture.marks if " " in mark.label]
    return [c for c, s in pairs if color in (None, c) and shape in (None, s)]


def _image_named(question: str, count: int) -> int | None:
    found = NAMED_IMAGE.search(question.lower())
    if found is None:
        return None
    return int(found[1]) - 1 if found[1] else count - 1 if found[2] == "last" else ORDINALS.index(found[2])


def _check(turn: Turn, pictures: tuple[Picture, ...]) -> str:
    """Asserts that the answer is right and says what kind of question it was."""
    color, shape = (re.search(rf"\b({words})(?:es|s)?\b", turn.question.lower()) for words in (COLOR, SHAPE))
    index = _image_named(turn.question, len(pictures))
    if turn.answer.startswith("Image-"):
        wanted = int(turn.answer[6:]) - 1
        said = [number for number, picture in enumerate(pictures) if _is_text(picture)]
        if wanted in said:
            text = _text(pictures[wanted])
            assert text in turn.question.replace(" ", "").replace('"', "")
            assert [n for n in said if _text(pictures[n]).casefold() == text.casefold()] == [wanted]
            return "which says"
        assert color or shape
        found = [bool(_matching(p, color and color[1], shape and shape[1])) for p in pictures]
        assert [number for number, has in enumerate(found) if has] == [wanted], turn
        return "which has"
    if index is None:
        assert turn.answer == str(len(pictures)), turn
        return "how many images"
    picture = pictures[index]
    if _is_text(picture):
        assert turn.answer.replace(" ", "") == _text(picture), turn
        return "what says"
    if turn.answer in COLORS:
        assert _matching(picture, None, shape and shape[1]) == [turn.answer], turn
        return "color"
    if turn.answer.isdigit():
        assert turn.answer == str(len(_matching(picture, None, shape and shape[1]))), turn
        return "how many in"
    if turn.answer in ("yes", "no"):
        assert shape and (turn.answer == "yes") == bool(_matching(picture, None, shape[1])), turn
        return "is in"
    listed = sum(int(word) if word.isdigit() else 1 for word in re.findall(r"\b(?:an?|\d)\b", turn.answer))
    assert listed == len(picture.marks), turn
    assert all(mark.label in turn.answer for mark in picture.marks), turn
    return "what is in"


def test_every_answer_is_right_and_every_kind_comes_up(samples: list[Sample]) -> None:
    kinds = Counter(_check(turn, sample.pictures) for sample in samples for turn in sample.turns)
    assert set(kinds) == {
        "which says",
        "which has",
        "how many images",
        "what says",
        "color",
        "how many in",
        "is in",
        "what is in",
    }
    assert min(kinds.values()) >= 15
    assert kinds["which has"] > 200 and kinds["what says"] > 150


def test_all_images_are_answers_about_equally_often(samples: list[Sample]) -> None:
    answers = Counter(turn.answer for sample in samples if len(sample.pictures) == 3 for turn in sample.turns)
    counts = [answers[f"Image-{number}"] for number in (1, 2, 3)]
    assert min(counts) > 0.7 * max(counts)


def test_images_are_numbered_or_have_no_labels(samples: list[Sample]) -> None:
    labels = Counter(sample.labels for sample in samples if len(sample.pictures) == 2)
    assert set(labels) == {(), ("Image-1: ", "Image-2: ")}
    assert labels[()] < labels["Image-1: ", "Image-2: "]


def test_every_picture_has_its_size_and_the_tiles_are_the_callers_choice(fonts: FontShelf) -> None:
    sizes = [(300, 200), (500, 250)]
    sample = make_comparison(random.Random(1), sizes, fonts, 1.0, max_tiles=None)
    assert [picture.image.size for picture in sample.pictures] == sizes
    assert sample.max_tiles is None
    assert make_comparison(random.Random(1), sizes, fonts, 1.0).max_tiles == 1


def test_the_same_state_gives_the_same_sample(fonts: FontShelf) -> None:
    one, other = (make_comparison(random.Random(8), [(200, 200)] * 3, fonts, 1.0) for _ in range(2))
    assert one.turns == other.turns and one.labels == other.labels
    for first, second in zip(one.pictures, other.pictures, strict=True):
        assert first.marks == second.marks and first.image.tobytes() == second.image.tobytes()
