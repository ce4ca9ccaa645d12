"""Directions are read back from where the marks move."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest
from PIL import ImageChops

from deploy.demo_training.clips import make_clip
from deploy.demo_training.fonts import FontShelf
from deploy.demo_training.sample import COLORS, SHAPES, Mark, Sample

AT_REST = "it does not move"


@pytest.fixture(scope="module")
def clips(fonts: FontShelf) -> list[tuple[float, Sample]]:
    levels = [seed % 3 / 2 for seed in range(900)]
    sizes = [(128, 128), (160, 100), (90, 150)]
    return [
        (level, make_clip(random.Random(seed), sizes[seed % 3], fonts, level, 2 + seed % 5))
        for seed, level in enumerate(levels)
    ]


def _path(sample: Sample, label: str) -> list[Mark]:
    return [next(mark for mark in picture.marks if mark.label == label) for picture in sample.pictures]


def _label_asked(sample: Sample) -> str:
    """The label of the only object that the first question can mean."""
    question = sample.turns[0].question.lower().replace("ball", "circle")
    color, shape = (re.search(rf"\b({'|'.join(words)})\b", question) for words in (COLORS, SHAPES))
    labels = [
        mark.label
        for mark in sample.pictures[0].marks
        if (color is None or color[1] in mark.label.split())
        and (shape is None or shape[1] in mark.label.split())
    ]
    assert len(labels) == 1, (sample.turns, labels)
    return labels[0]


def test_the_answer_is_how_the_marks_move(clips: list[tuple[float, Sample]]) -> None:
    for level, sample in clips:
        path = _path(sample, _label_asked(sample))
        across, down = path[-1].x - path[0].x, path[-1].y - path[0].y
        size = sample.pictures[0].image.size
        answer = sample.turns[0].answer
        if answer == AT_REST:
            assert (across, down) == (0, 0)
            continue
        moved = {"left": -across, "right": across, "up": -down, "down": down}[answer]
        assert moved >= 0.35 - 0.15 * level - 0.001
        aside = abs(down) * size[1] if answer in ("left", "right") else abs(across) * size[0]
        along = moved * size[0 if answer in ("left", "right") else 1]
        assert aside <= 0.31 * along


def test_every_frame_goes_on_in_the_same_direction(clips: list[tuple[float, Sample]]) -> None:
    for _, sample in clips:
        path = _path(sample, _label_asked(sample))
        steps = [
            {"left": one.x - two.x, "right": two.x - one.x, "up": one.y - two.y, "down": two.y - one.y}.get(
                sample.turns[0].answer
            )
            for one, two in zip(path, path[1:], strict=False)
        ]
        assert all(step is None or step > 0.02 for step in steps)


def test_at_most_one_object_moves_and_none_leaves_the_picture(clips: list[tuple[float, Sample]]) -> None:
    for _, sample in clips:
        first, last = sample.pictures[0].marks, sample.pictures[-1].marks
        assert sum(one != other for one, other in zip(first, last, strict=True)) <= 1
        assert all(0 < mark.x < 1 and 0 < mark.y < 1 for picture in sample.pictures for mark in picture.marks)
        assert len({mark.label.split()[0] for mark in first}) == len(
            {mark.label.split()[1] for mark in first}
        )


def test_pictures_change_where_the_object_moves_and_only_then(fonts: FontShelf) -> None:
    for seed in range(60):
        sample = make_clip(random.Random(seed), (128, 128), fonts, 0.0, 3)
        first, last = sample.pictures[0], sample.pictures[-1]
        changed = ImageChops.difference(first.image, last.image).getextrema()
        if first.marks != last.marks:
            assert max(high for _, high in changed) > 30
        else:
            assert first.image.tobytes() == last.image.tobytes()


def test_directions_are_balanced_and_a_tenth_rests(clips: list[tuple[float, Sample]]) -> None:
    answers = Counter(sample.turns[0].answer for _, sample in clips)
    assert set(answers) == {"left", "right", "up", "down", AT_REST}
    assert all(160 < answers[direction] < 260 for direction in ("left", "right", "up", "down"))
    assert 60 < answers[AT_REST] < 150


def test_a_second_turn_names_the_color(clips: list[tuple[float, Sample]]) -> None:
    second = [sample for _, sample in clips if len(sample.turns) == 2]
    assert len(second) > 100
    for sample in second:
        assert sample.turns[1].task == "color"
        assert sample.turns[1].answer == _label_asked(sample).split()[0]


def test_frames_are_labelled_as_internvl_does_or_not_at_all(clips: list[tuple[float, Sample]]) -> None:
    labels = {sample.labels for _, sample in clips if len(sample.pictures) == 3}
    assert labels == {(), ("Frame1: ", "Frame2: ", "Frame3: ")}
    assert all(sample.max_tiles == 1 for _, sample in clips)


def test_the_same_state_gives_the_same_frames(fonts: FontShelf) -> None:
    one, other = (make_clip(random.Random(4), (200, 150), fonts, 1.0, 4) for _ in range(2))
    assert one.turns == other.turns and len(one.pictures) == 4
    for first, second in zip(one.pictures, other.pictures, strict=True):
        assert first.marks == second.marks and first.image.tobytes() == second.image.tobytes()
        assert first.image.size == (200, 150)
