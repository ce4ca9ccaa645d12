"""Questions about scenes made by hand, whose answers can be seen."""

from __future__ import annotations

import random

from deploy.demo_training.sample import Turn
from deploy.demo_training.scenes import Scene, Thing
from deploy.demo_training.shape_questions import (
    Asker,
    ask_color,
    ask_count,
    ask_describe,
    ask_place,
    ask_shape,
    ask_yes_no,
    describe,
    reference,
)

SIZE = (300, 300)
# A red circle left of a blue square, another red circle below.
CORNER = Scene(
    SIZE,
    (
        Thing("red", "circle", 50, 50, 60),
        Thing("blue", "square", 250, 50, 60),
        Thing("red", "circle", 50, 250, 60),
    ),
)
ALONE = Scene(SIZE, (Thing("orange", "star", 150, 150, 80),))


def _turns(asker: Asker, scene: Scene, tries: int = 300) -> list[Turn]:
    return [turn for seed in range(tries) if (turn := asker(random.Random(seed), scene)) is not None]


def test_the_color_of_several_objects_is_asked_only_if_they_share_it() -> None:
    answers = {
        "circle" if "circle" in turn.question.lower() else "square": turn.answer
        for turn in _turns(ask_color, CORNER)
    }
    assert answers == {"circle": "red", "square": "blue"}
    mixed = Scene(SIZE, (*CORNER.things, Thing("green", "circle", 250, 250, 60)))
    assert {turn.answer for turn in _turns(ask_color, mixed)} == {"blue"}


def test_the_shape_is_asked_only_of_a_color_that_one_object_has() -> None:
    turns = _turns(ask_shape, CORNER)
    assert {turn.answer for turn in turns} == {"square"}
    assert all("blue" in turn.question.lower() for turn in turns)


def test_counts_include_zero_and_all() -> None:
    assert {turn.answer for turn in _turns(ask_count, CORNER)} == {"0", "1", "2", "3"}
    assert {turn.answer for turn in _turns(ask_count, ALONE)} == {"0", "1"}


def test_places_and_neighbours_are_those_of_the_scene() -> None:
    assert {turn.answer for turn in _turns(ask_place, CORNER, 900)} == {
        "top right",  # the blue square; of the two circles none has a name of its own
        "a red circle",
        "a blue square",
    }
    assert {turn.answer for turn in _turns(ask_place, ALONE)} == {"center", "an orange star"}


def test_a_reference_means_one_object_alone() -> None:
    rng = random.Random(3)
    assert reference(rng, CORNER, CORNER.things[0]) is None
    names = {reference(rng, CORNER, CORNER.things[1]) for _ in range(100)}
    assert names == {"square", "blue square", "blue object", "blue shape", "blue thing", "blue one"}


def test_yes_and_no_are_equally_frequent() -> None:
    for scene in (CORNER, ALONE):
        answers = [turn.answer for turn in _turns(ask_yes_no, scene, 1000)]
        assert set(answers) == {"yes", "no"}
        assert 0.44 < answers.count("yes") / len(answers) < 0.56


def test_descriptions_group_equal_objects() -> None:
    assert describe(CORNER) == "2 red circles and a blue square"
    assert describe(ALONE) == "an orange star"
    assert {turn.answer for turn in _turns(ask_describe, ALONE)} == {"an orange star"}


def test_more_than_four_groups_are_not_described() -> None:
    shapes = ("circle", "square", "star", "heart", "cross")
    things = tuple(Thing("red", shape, 30 + 55 * index, 150, 40) for index, shape in enumerate(shapes))
    assert describe(Scene(SIZE, things)) is None
    assert describe(Scene(SIZE, things[:3])) == "a red circle, a red square and a red star"
