"""What a scene lists is what its picture shows."""

from __future__ import annotations

import random

import pytest

from deploy.demo_training.colors import COLOR_RANGES, ColorRange
from deploy.demo_training.sample import MARK_LABELS
from deploy.demo_training.scenes import make_scene


def _channel_bounds(box: ColorRange) -> tuple[int, int]:
    """Least and greatest of the largest channel of that colour's values."""
    return round(box.value[0] * 255) - 2, round(box.value[1] * 255) + 2


def test_the_centre_of_every_object_has_its_color() -> None:
    for seed in range(150):
        scene, image = make_scene(random.Random(seed), (256, 200), 1.0)
        for thing in scene.things:
            pixel = image.getpixel((round(thing.x), round(thing.y)))
            assert isinstance(pixel, tuple)
            low, high = _channel_bounds(COLOR_RANGES[thing.color])
            assert low <= max(pixel) <= high, (seed, thing, pixel)


def test_there_is_one_mark_per_object_inside_the_picture() -> None:
    for seed in range(100):
        scene, _ = make_scene(random.Random(seed), (672, 448), 1.0)
        marks = scene.marks()
        assert [mark.label for mark in marks] == [f"{thing.color} {thing.shape}" for thing in scene.things]
        for mark, thing in zip(marks, scene.things, strict=True):
            assert mark.label in MARK_LABELS
            assert 0 < mark.x < 1 and 0 < mark.y < 1
            assert (mark.x * 672, mark.y * 448) == pytest.approx((thing.x, thing.y))


def test_the_easiest_scenes_have_one_or_two_objects_and_the_hardest_up_to_eight() -> None:
    easy = {len(make_scene(random.Random(seed), (128, 128), 0.0)[0].things) for seed in range(60)}
    hard = {len(make_scene(random.Random(seed), (128, 128), 1.0)[0].things) for seed in range(200)}
    assert easy == {1, 2} and hard == set(range(1, 9))


def test_scenes_have_both_equal_and_different_objects() -> None:
    kinds = [
        [thing.name for thing in make_scene(random.Random(seed), (128, 128), 1.0, 6)[0].things]
        for seed in range(300)
    ]
    several = [names for names in kinds if len(names) >= 3]
    alike = sum(len(set(names)) == 1 for names in several)
    different = sum(len(set(names)) == len(names) for names in several)
    assert alike > 10 and different > 60
