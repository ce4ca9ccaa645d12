"""Answers checked against the marks of the picture by an oracle that reads the question on its own."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from deploy.demo_training.fonts import FontShelf
from deploy.demo_training.sample import COLORS, SHAPES, Mark, Sample, Turn
from deploy.demo_training.shapes import make_shapes

COLOR, SHAPE = "|".join(COLORS), "|".join(SHAPES)
MENTION = re.compile(
    rf"\b(?:({COLOR}) )?({SHAPE})(?:es|s)?\b"
    rf"|\b({COLOR}) (?:object|shape|thing|one)s?\b|\banything ({COLOR})\b"
)
SIDES = {
    "left": r"\bleft of",
    "right": r"\bright of",
    "above": r"\b(?:above|over|on top of)\b",
    "below": r"\b(?:below|under|beneath)\b",
}


@pytest.fixture(scope="module")
def samples(fonts: FontShelf) -> list[Sample]:
    sizes = [(128, 128), (192, 128), (120, 180)]
    return [make_shapes(random.Random(seed), sizes[seed % 3], fonts, seed % 5 / 4) for seed in range(1500)]


def _asked(samples: list[Sample], task: str) -> list[tuple[Turn, tuple[Mark, ...]]]:
    found = [
        (turn, sample.pictures[0].marks) for sample in samples for turn in sample.turns if turn.task == task
    ]
    assert len(found) > 100
    return found


def _mentions(question: str) -> list[tuple[str | None, str | None]]:
    """(colour, shape) of every group of objects that the question speaks of."""
    found = MENTION.findall(question.lower())
    return [(color or only or anything or None, shape or None) for color, shape, only, anything in found]


def _meant(marks: tuple[Mark, ...], mention: tuple[str | None, str | None]) -> list[Mark]:
    color, shape = mention
    labels = [(mark, *mark.label.split()) for mark in marks]
    return [mark for mark, c, s in labels if color in (None, c) and shape in (None, s)]


def _is_on(side: str, mark: Mark, mate: Mark) -> bool:
    return {
        "left": mark.x < mate.x,
        "right": mark.x > mate.x,
        "above": mark.y < mate.y,
        "below": mark.y > mate.y,
    }[side]


def test_colors_are_those_of_the_objects_asked_about(samples: list[Sample]) -> None:
    for turn, marks in _asked(samples, "color"):
        mentions = _mentions(turn.question)
        meant = _meant(marks, mentions[0]) if mentions else list(marks)
        assert {mark.label.split()[0] for mark in meant} == {turn.answer}, turn


def test_shapes_are_those_of_the_only_object_asked_about(samples: list[Sample]) -> None:
    for turn, marks in _asked(samples, "shape"):
        color = re.search(rf"\b({COLOR})\b", turn.question.lower())
        meant = _meant(marks, (color[1], None)) if color else list(marks)
        assert [mark.label.split()[1] for mark in meant] == [turn.answer], turn


def test_counts_are_right(samples: list[Sample]) -> None:
    for turn, marks in _asked(samples, "count"):
        mentions = _mentions(turn.question)
        assert str(len(_meant(marks, mentions[0])) if mentions else len(marks)) == turn.answer, turn


def test_yes_and_no_are_right(samples: list[Sample]) -> None:
    for turn, marks in _asked(samples, "yes_no"):
        mentions = _mentions(turn.question)
        side = next((side for side, words in SIDES.items() if re.search(words, turn.question.lower())), None)
        if side is not None:
            (mark,), (mate,) = (_meant(marks, mention) for mention in mentions)
            truth = _is_on(side, mark, mate)
        elif color := re.search(rf"(?:{SHAPE}) (?:have the color )?({COLOR})\b", turn.question.lower()):
            (mark,) = _meant(marks, mentions[0])
            truth = mark.label.split()[0] == color[1]
        else:
            truth = bool(_meant(marks, mentions[0]))
        assert turn.answer == ("yes" if truth else "no"), turn


def test_places_are_right(samples: list[Sample]) -> None:
    kinds: Counter[str] = Counter()
    for turn, marks in _asked(samples, "place"):
        kinds[_check_place(turn, marks)] += 1
    assert min(kinds[kind] for kind in ("ninth", "side", "neighbour", "what is in")) > 20


def _check_place(turn: Turn, marks: tuple[Mark, ...]) -> str:
    """Asserts that the answer is right and says what kind of question it was."""
    mentions, question = _mentions(turn.question), turn.question.lower()
    if turn.answer.startswith(("a ", "an ")):
        label = turn.answer.split(" ", 1)[1]
        assert turn.answer.startswith("an ") == (label[0] in "aeiou")
        if mentions:
            (mate,) = _meant(marks, mentions[-1])
            side = next(side for side, words in SIDES.items() if re.search(words, question))
            on_side = [mark for mark in marks if _is_on(side, mark, mate)]
            axis = (
                (lambda m: abs(m.x - mate.x)) if side in ("left", "right") else (lambda m: abs(m.y - mate.y))
            )
            across = (
                (lambda m: abs(m.y - mate.y)) if side in ("left", "right") else (lambda m: abs(m.x - mate.x))
            )
            nearest = min(on_side, key=lambda mark: axis(mark) + 2 * across(mark))
            assert nearest.label == label, turn
            return "neighbour"
        place = re.search(r"(top|bottom) (left|right)|center", question)
        assert place is not None
        assert [mark.label for mark in marks if _thirds(mark) == place[0]] == [label], turn
        return "what is in"
    (mark,) = _meant(marks, mentions[0])
    if len(mentions) == 2:
        (mate,) = _meant(marks, mentions[1])
        assert _is_on(turn.answer, mark, mate), turn
        return "side"
    assert _thirds(mark) == turn.answer, turn
    return "ninth"


def _thirds(mark: Mark) -> str:
    row, column = ("top", "", "bottom")[int(mark.y * 3)], ("left", "", "right")[int(mark.x * 3)]
    return f"{row} {column}".strip() or "center"


def test_descriptions_list_every_object_once_in_reading_order(samples: list[Sample]) -> None:
    for turn, marks in _asked(samples, "describe"):
        listed: list[tuple[str, int]] = []
        for item in re.split(r", | and ", turn.answer):
            number, name = item.split(" ", 1)
            assert number in ("a", "an") or (number.isdigit() and int(number) > 1)
            assert (number == "an") == (number in ("a", "an") and name[0] in "aeiou")
            single = re.sub(r"(?<=cross)es$|(?<!cros)s$", "", name) if number.isdigit() else name
            listed.append((single, int(number) if number.isdigit() else 1))
        assert Counter(dict(listed)) == Counter(mark.label for mark in marks), turn
        assert len(listed) <= 4
        firsts = [min(mark.y for mark in marks if mark.label == name) for name, _ in listed]
        assert all(later > earlier - 0.08 for earlier, later in zip(firsts, firsts[1:], strict=False)), turn


def test_questions_of_a_conversation_differ(samples: list[Sample]) -> None:
    for sample in samples:
        assert 1 <= len(sample.turns) <= 4
        assert len({turn.question.lower().rstrip("?.!") for turn in sample.turns}) == len(sample.turns)


def test_answers_are_balanced(samples: list[Sample]) -> None:
    answers = Counter((turn.task, turn.answer) for sample in samples for turn in sample.turns)
    assert 0.85 < answers["yes_no", "yes"] / answers["yes_no", "no"] < 1.18
    assert {answer for task, answer in answers if task == "count"} == set("012345678")
    assert min(answers["color", color] for color in COLORS) > 20
    assert min(answers["shape", shape] for shape in SHAPES) > 20


def test_the_same_state_gives_the_same_sample(fonts: FontShelf) -> None:
    for level in (0.0, 1.0):
        one, other = (make_shapes(random.Random(11), (256, 256), fonts, level) for _ in range(2))
        assert one.turns == other.turns and one.pictures[0].marks == other.pictures[0].marks
        assert one.pictures[0].image.tobytes() == other.pictures[0].image.tobytes()


@pytest.mark.parametrize("size", [(256, 256), (672, 448), (180, 300)])
def test_pictures_have_the_size_asked_for(fonts: FontShelf, size: tuple[int, int]) -> None:
    image = make_shapes(random.Random(5), size, fonts, 1.0).pictures[0].image
    assert image.size == size and image.mode == "RGB"
